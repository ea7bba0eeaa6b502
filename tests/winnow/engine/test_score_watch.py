"""The scores of a prompt's tokens agree with the attention of its window, and with the cut."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.winnow.drive import ASL, prompt
from winnow.catalog import METHODS
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.score_watch import ScoreWatch
from winnow.methods.base import Cut, LayerView
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.token_scores import TokenScores

NUM_TOKENS = 60


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["qwen2"])


class Views:
    """The window's attention and the cut of each layer, as they are."""

    def __init__(self) -> None:
        self.mass: dict[int, torch.Tensor] = {}
        self.cuts: list[tuple[int, list[int]]] = []

    def __call__(self, view: LayerView, cut: Cut | None) -> None:
        self.mass[view.layer_idx] = view.window_mass
        if cut is not None:
            self.cuts.append((view.layer_idx, cut.kept.tolist()))


def _scored(
    model: DecoderModel,
    settings: PruningSettings,
    num_tokens: int,
    store: PrefixStore | None = None,
) -> tuple[TokenScores, Views, PrefillReport]:
    watch = ScoreWatch(settings, num_tokens, model.shape)
    views = Views()

    def both(view: LayerView, cut: Cut | None) -> None:
        watch(view, cut)
        views(view, cut)

    run = PrefillRun(model, prompt(num_tokens), settings, both, store=store, is_long=False)
    while not run.finished:
        run.compute_layer()
    return watch.result(), views, run.result().report


def _settings(method: str) -> PruningSettings:
    return replace(ASL, method=method, fixed_layer=1)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_shares_of_the_window_s_attention(method: str, model: DecoderModel) -> None:
    """Of all its queries and heads, pooled over neighbours; naively from the attention itself."""
    settings = _settings(method)
    found, views, report = _scored(model, settings, NUM_TOKENS)
    layer_idx = report.selection_layer
    assert found.layer_idx == (model.shape.num_layers - 1 if layer_idx is None else layer_idx)
    share = views.mass[found.layer_idx].mean(0) / settings.window_size  # [N], sums to 1
    before = share[: -settings.window_size]
    half = settings.kernel_size // 2
    padded = torch.nn.functional.pad(before, (half, half))
    pooled = padded.unfold(0, settings.kernel_size, 1).mean(1)
    assert torch.allclose(torch.from_numpy(found.scores), pooled, atol=1e-7)
    assert 0 < found.scores.sum() < 1


@pytest.mark.parametrize("method", METHODS)
def test_the_last_layer_of_each_token_is_that_of_its_cut(method: str, model: DecoderModel) -> None:
    found, views, _ = _scored(model, _settings(method), NUM_TOKENS)
    expected, going_on = [model.shape.num_layers - 1] * NUM_TOKENS, list(range(NUM_TOKENS))
    for layer_idx, kept in views.cuts:
        for token in set(going_on) - {going_on[idx] for idx in kept}:
            expected[token] = layer_idx
        going_on = [going_on[idx] for idx in kept]
    assert found.last_layers.tolist() == expected


def test_are_the_same_where_the_beginning_was_computed_before(model: DecoderModel) -> None:
    store = PrefixStore(model, 1 << 20, block_tokens=16)
    first, _, _ = _scored(model, ASL, NUM_TOKENS, store)
    again, _, report = _scored(model, ASL, NUM_TOKENS, store)
    assert report.num_cached_tokens > 0
    assert again.layer_idx == first.layer_idx
    assert again.scores == pytest.approx(first.scores, rel=1e-4)
    assert (again.last_layers == first.last_layers).all()


@pytest.mark.parametrize("num_tokens", [1, ASL.window_size])
def test_a_prompt_within_the_window_has_no_scores(num_tokens: int, model: DecoderModel) -> None:
    found, _, _ = _scored(model, ASL, num_tokens)
    assert found.layer_idx is None
    assert found.scores.tolist() == []
    assert found.last_layers.tolist() == [model.shape.num_layers - 1] * num_tokens


def test_travel_between_processes(model: DecoderModel) -> None:
    found, _, _ = _scored(model, ASL, NUM_TOKENS)
    arrived = pickle.loads(pickle.dumps(found))
    assert arrived.layer_idx == found.layer_idx
    assert (arrived.scores == found.scores).all()
    assert (arrived.last_layers == found.last_layers).all()
