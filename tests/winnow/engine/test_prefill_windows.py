"""Prefill of models whose layers attend to windows and chunks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models_in_code import save_tiny_model, tiny_config
from tests.winnow import reference
from tests.winnow.drive import ASL, UNPRUNED, prefill_all, prompt
from tests.winnow.engine.from_store import assert_same, make_store, prefill
from tests.winnow.layers import theirs
from tests.winnow.windowed import PATTERNS, Expected, WindowedModel, prefill_by_formulas
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillResult
from winnow.kv import LayerKV
from winnow.layers import FULL, layers_of
from winnow.pruning_settings import PruningSettings

UNCUT = replace(UNPRUNED, window_size=6)
PRUNED = replace(ASL, window_size=6, kv_budget=12, latest_layer=4, min_layer=3, threshold=0.9)
SETTINGS = {
    "full": UNCUT,
    "snapkv": replace(PRUNED, method="snapkv"),
    "asl": PRUNED,
    "asl early": replace(PRUNED, observed_layers=1, min_layer=0, threshold=2.0, latest_layer=None),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("windows"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def models(path: Path) -> dict[str, WindowedModel]:
    network = theirs(path, torch.float32)
    return {
        name: WindowedModel(path, network, layers, extras=name != "sliding")
        for name, layers in PATTERNS.items()
    }


def settings_for(model: DecoderModel, name: str) -> PruningSettings:
    """Those of the name, with the full layers next to those that they name."""
    settings, shape = SETTINGS[name], model.shape
    if settings.latest_layer is None:
        return settings
    return replace(settings, latest_layer=shape.nearest_full(settings.latest_layer))


def assert_as_expected(layers: list[LayerKV], result: PrefillResult, expected: Expected) -> None:
    report = result.report
    assert report.selection_layer == expected.selection_layer
    assert [layer for layer, _ in report.rho] == [layer for layer, _ in expected.rho]
    assert [rho for _, rho in report.rho] == pytest.approx([rho for _, rho in expected.rho])
    for layer, kept in zip(layers, expected.kept, strict=True):
        found = [layer.positions[rows].tolist() for rows in layer.head_slices()]
        assert found == kept, f"layer {layer.layer_idx}"
    torch.testing.assert_close(result.final_hidden, expected.final_hidden, rtol=1e-4, atol=1e-4)


CASES = [
    (pattern, name)
    for pattern, layers in PATTERNS.items()
    for name in SETTINGS
    if name == "full" or FULL in layers
]


@pytest.mark.parametrize(("pattern", "name"), CASES)
@pytest.mark.parametrize("num_tokens", [7, 56, 61])
def test_prefill_is_what_the_formulas_with_masks_by_position_give(
    models: dict[str, WindowedModel], pattern: str, name: str, num_tokens: int
) -> None:
    model, token_ids = models[pattern], prompt(num_tokens)
    settings = settings_for(model, name)
    expected = prefill_by_formulas(model, token_ids, settings)
    assert_as_expected(*prefill_all(model, token_ids, settings), expected)


@pytest.mark.parametrize(
    "method", ["snapkv", "streaming", "h2o", "fastkv", "gemfilter", "asl-2pass"]
)
def test_every_method_keeps_at_most_its_window_of_a_windowed_layer(
    models: dict[str, WindowedModel], method: str
) -> None:
    settings = replace(PRUNED, method=method, fixed_layer=3, latest_layer=3)
    layers, result = prefill_all(models["gemma"], prompt(60), settings)
    report = result.report
    for layer in layers[::2]:
        last = range(report.next_position - 7, report.next_position)
        assert set(layer.positions.tolist()) <= {*last}, "seen from the next position"
        assert layer.window_queries.shape == (4, 0, 16)
    assert report.kv_bytes_full == 3 * (60 + 7) * 2 * (2 * 16 * 4)
    assert report.kv_bytes_kept == sum(report.layer_entries) * 2 * 16 * 4
    if method in ("fastkv", "gemfilter", "asl-2pass"):
        assert report.selection_layer == 3


@pytest.mark.parametrize(("pattern", "name"), [c for c in CASES if c[1] in ("full", "asl")])
def test_from_the_prefix_store_as_from_scratch(
    models: dict[str, WindowedModel], pattern: str, name: str
) -> None:
    model = models[pattern]
    settings, store = settings_for(model, name), make_store(model)
    beginning = prompt(50)
    for seed in (1, 2):
        token_ids = beginning + prompt(20, seed)
        from_store = prefill(model, token_ids, settings, store)
        # Six layers of windows add up to numbers of 25, in other blocks.
        assert_same(from_store, prefill(model, token_ids, settings), atol=1e-4)
    assert store.stats().hit_tokens == 48


@pytest.mark.parametrize("window", [8, 30])
def test_mistral_with_a_window_gives_the_logits_of_transformers(
    path: Path, window: int, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 6, "sliding_window": window}
    mistral = save_tiny_model(tmp_path, "mistral", **changes)
    layers = layers_of(tiny_config("mistral", **changes), 6, 8192)
    model = WindowedModel(path, theirs(mistral, torch.float32), layers)
    _, result = prefill_all(model, prompt(61), UNCUT)
    with torch.no_grad():
        expected = reference.load(mistral, "eager")(torch.tensor([prompt(61)])).logits
    ours = model.logits(result.final_hidden[None])[0]
    torch.testing.assert_close(ours, expected[0, -1], rtol=1e-4, atol=1e-4)
