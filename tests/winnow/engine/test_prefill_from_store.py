"""From the prefix store = from scratch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models_in_code import FAMILIES
from tests.winnow.drive import all_layers, prompt
from tests.winnow.methods.small_runs import SMALL
from winnow.catalog import METHODS
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.kv import LayerKV
from winnow.methods import method_class
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

BLOCK = 16
WITH_PREFIX = [name for name in METHODS if method_class(name).no_prefix_reason is None]
WITHOUT_PREFIX = [name for name in METHODS if name not in WITH_PREFIX]
FASTKV = replace(SMALL, method="fastkv", fixed_layer=1)

Prefilled = tuple[list[LayerKV], PrefillResult]


def make_store(
    model: DecoderModel, max_bytes: int = 64 << 20, location: str = "device"
) -> PrefixStore:
    return PrefixStore(model, max_bytes, location=location, block_tokens=BLOCK)


def prefill(
    model: DecoderModel,
    token_ids: Sequence[int],
    pruning: PruningSettings,
    store: PrefixStore | None = None,
    cache_salt: str = "",
) -> Prefilled:
    run = PrefillRun(model, token_ids, pruning, store=store, cache_salt=cache_salt)
    layers = [layer for layer in all_layers(run) if layer is not None]
    return layers, run.result(keep_hidden=True)


def assert_same(one: Prefilled, other: Prefilled) -> None:
    """Same layer, tokens and entries; in float32, the same numbers but for rounding."""
    (layers, result), (others, expected) = one, other
    report, wanted = result.report, expected.report
    assert report.selection_layer == wanted.selection_layer
    assert report.no_selection_reason == wanted.no_selection_reason
    assert report.num_selected_tokens == wanted.num_selected_tokens
    assert report.next_position == wanted.next_position
    assert report.layer_entries == wanted.layer_entries
    assert [layer for layer, _ in report.rho] == [layer for layer, _ in wanted.rho]
    assert [value for _, value in report.rho] == pytest.approx([value for _, value in wanted.rho])
    for layer, like in zip(layers, others, strict=True):
        assert layer.head_lengths == like.head_lengths
        assert torch.equal(layer.positions, like.positions)
        for name in ("keys", "values", "window_queries"):
            close(getattr(layer, name), getattr(like, name))
    close(result.final_hidden, expected.final_hidden)
    assert result.hidden is not None
    assert expected.hidden is not None
    close(result.hidden, expected.hidden)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", WITH_PREFIX)
def test_a_follow_up_gets_what_it_gets_from_scratch(
    tiny_models: dict[str, Path], family: str, method: str
) -> None:
    model, pruning = load_model(tiny_models[family]), replace(SMALL, method=method)
    store, document = make_store(model), prompt(60)
    for seed, question in ((1, 10), (2, 20), (3, 3)):
        token_ids = document + prompt(question, seed)
        found = prefill(model, token_ids, pruning, store)
        assert_same(found, prefill(model, token_ids, pruning))
        report = found[1].report
        assert report.no_prefix_reason is None
        assert report.num_cached_tokens == (0 if seed == 1 else 48)
    assert store.stats().num_blocks_in_use == 0
