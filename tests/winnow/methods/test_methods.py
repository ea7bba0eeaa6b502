"""What holds for every method; each runs by its name in winnow.methods.METHODS."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.winnow.drive import (
    UNPRUNED,
    prefill_all,
    prompt,
)
from tests.winnow.methods.small_runs import GREEDY, NUM_KV_HEADS, SMALL, answer
from winnow.catalog import COMPRESSIONS, METHODS
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.kv import LayerKV
from winnow.methods import method_class
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings

N = 60


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["llama"])


def assert_same_prefill(
    pruned: tuple[list[LayerKV], PrefillResult], full: tuple[list[LayerKV], PrefillResult]
) -> None:
    assert torch.equal(pruned[1].final_hidden, full[1].final_hidden)
    for layer, other in zip(pruned[0], full[0], strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        assert torch.equal(layer.positions, other.positions)
        assert torch.equal(layer.window_queries, other.window_queries)
    reason = pruned[1].report.no_selection_reason
    assert pruned[1].report == replace(full[1].report, no_selection_reason=reason)
    assert reason in ("off", "short_prompt")


@pytest.mark.parametrize("num_tokens", [9, 20, N])
@pytest.mark.parametrize("over", [0, 1, 1000])
@pytest.mark.parametrize("compression", ["snapkv", "adakv"])
@pytest.mark.parametrize("method", METHODS)
def test_budgets_of_at_least_the_prompts_length_change_nothing(
    model: DecoderModel, method: str, compression: str, over: int, num_tokens: int
) -> None:
    token_ids, budget = prompt(num_tokens), num_tokens + over
    settings = replace(
        SMALL, method=method, compression=compression, select_tokens=budget, kv_budget=budget
    )
    assert_same_prefill(
        prefill_all(model, token_ids, settings), prefill_all(model, token_ids, UNPRUNED)
    )
    assert answer(model, token_ids, settings) == answer(model, token_ids, UNPRUNED)


@pytest.mark.parametrize("num_tokens", [1, 7, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_no_longer_than_the_window_is_not_pruned(
    model: DecoderModel, method: str, num_tokens: int
) -> None:
    token_ids = prompt(num_tokens)
    settings = replace(SMALL, method=method)
    assert_same_prefill(
        prefill_all(model, token_ids, settings), prefill_all(model, token_ids, UNPRUNED)
    )


@pytest.mark.parametrize("full_kv_below", [False, True])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_report_says_what_was_done(
    model: DecoderModel, method: str, compression: str, full_kv_below: bool
) -> None:
    settings = replace(
        SMALL, method=method, compression=compression, full_kv_below=full_kv_below, kv_top_p=0.5
    )
    layers, result = prefill_all(model, prompt(N), settings)
    report = result.report
    assert [layer.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert report.num_prompt_tokens == N
    assert report.layer_entries == tuple(layer.num_entries for layer in layers)
    assert report.kv_bytes_kept == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert report.kv_bytes_full == model.shape.kv_bytes(4 * NUM_KV_HEADS * N)
    assert (report.selection_layer is None) == (report.no_selection_reason is not None)
    if report.selection_layer is None:
        assert report.no_selection_reason == "off"
        assert (report.num_selected_tokens, report.computed_share) == (N, 1.0)
    else:
        assert report.num_selected_tokens < N
        assert report.computed_share != 1.0
    assert report.next_position in (N, report.num_selected_tokens)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_sound_and_within_the_bounds(
    model: DecoderModel, method: str, compression: str
) -> None:
    settings = replace(SMALL, method=method, compression=compression, kv_top_p=0.5)
    layers, result = prefill_all(model, prompt(N), settings)
    most = settings.max_prompt_entries(N, NUM_KV_HEADS)
    for layer in layers:
        assert max(layer.head_lengths) <= most
        assert layer.window_queries.shape == (4, 8, 16)
        for rows in layer.head_slices():
            positions = layer.positions[rows].tolist()
            assert positions == sorted(set(positions))
            assert positions[0] >= 0
            assert positions[-1] == result.report.next_position - 1, "the last token stays"
    average = method_class(method).entry_bound(settings).limit
    if average is not None:
        assert sum(result.report.layer_entries) <= average * NUM_KV_HEADS * 4
    if method != "full" and (compression != "none" or average is not None):
        assert result.report.kv_bytes_kept < result.report.kv_bytes_full


@pytest.mark.parametrize("method", METHODS)
def test_decoding_goes_on_after_pruning(model: DecoderModel, method: str) -> None:
    """The memory that was promised is enough, and the answer is the same each time."""
    settings = replace(SMALL, method=method)
    first = answer(model, prompt(N), settings)
    assert len(first) == GREEDY.max_tokens
    assert first == answer(model, prompt(N), settings)


@pytest.mark.parametrize("method", ["asl", "fastkv"])
def test_full_kv_below_keeps_all_up_to_the_selection_layer(
    model: DecoderModel, method: str
) -> None:
    settings = replace(SMALL, method=method, full_kv_below=True)
    layers, result = prefill_all(model, prompt(N), settings)
    plain, _ = prefill_all(model, prompt(N), replace(settings, full_kv_below=False))
    assert result.report.selection_layer is not None
    above = result.report.selection_layer + 1
    entries = result.report.layer_entries
    assert entries == (2 * N,) * above + (2 * 20,) * (4 - above)
    for layer, other in zip(layers[above:], plain[above:], strict=True):
        assert torch.equal(layer.positions, other.positions)
    assert settings.max_prompt_entries(N, NUM_KV_HEADS) == N


def test_full_kv_below_keeps_all_where_nothing_was_selected(model: DecoderModel) -> None:
    settings = replace(SMALL, full_kv_below=True, threshold=0.0, latest_layer=None)
    _, result = prefill_all(model, prompt(N), settings)
    assert result.report.no_selection_reason == "threshold_not_met"
    assert result.report.kv_bytes_kept == result.report.kv_bytes_full


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_memory_to_reserve_is_never_more_than_the_prompt(method: str, compression: str) -> None:
    settings = replace(SMALL, method=method, compression=compression)
    for num_tokens in (1, 19, 20, 21, 1000):
        assert 1 <= settings.max_prompt_entries(num_tokens, NUM_KV_HEADS) <= num_tokens


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (replace(SMALL, method="full"), 1000),
        (replace(SMALL, method="snapkv"), 20),
        (replace(SMALL, method="fastkv"), 20),
        (replace(SMALL, method="asl"), 20),
        (replace(SMALL, method="asl", full_kv_below=True), 1000),
        (replace(SMALL, method="asl", compression="top_p"), 1000),
        (replace(SMALL, method="asl", kv_budget=None), 1000),
        (replace(SMALL, method="gemfilter"), 24),
        (replace(SMALL, method="gemfilter", compression="none", kv_budget=None), 24),
        (replace(SMALL, method="asl-2pass"), 24),
        (replace(SMALL, method="pyramidinfer"), 1000),
        (replace(SMALL, method="streaming"), 20),
        (replace(SMALL, method="h2o"), 20),
        (replace(SMALL, method="asl", compression="adakv"), 30),
    ],
)
def test_the_memory_to_reserve_is_no_more_than_can_be_needed(
    settings: PruningSettings, most: int
) -> None:
    assert settings.max_prompt_entries(1000, NUM_KV_HEADS) == most


def test_methods_are_known_without_loading_torch() -> None:
    code = "import sys, winnow.pruning_settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("num_tokens", [9, 20, 24, 25, N])
@pytest.mark.parametrize("method", METHODS)
def test_the_work_left_is_known_where_the_cut_is(
    model: DecoderModel, method: str, num_tokens: int
) -> None:
    settings = replace(SMALL, method=method, threshold=0.0)  # ASL cuts at its latest layer
    run = PrefillRun(model, prompt(num_tokens), settings, is_long=False)
    while not run.finished:
        left_then = run.layer_tokens_left - run.next_layer_tokens
        run.compute_layer()
        assert run.layer_tokens_left == left_then
    assert run.layer_tokens_left == 0


@pytest.mark.parametrize("latest_layer", [None, 3])
@pytest.mark.parametrize("method", ["asl", "asl-2pass"])
def test_the_work_left_shrinks_by_a_cut_that_comes_early(
    model: DecoderModel, method: str, latest_layer: int | None
) -> None:
    settings = replace(SMALL, method=method, threshold=1.2, latest_layer=latest_layer)
    run = PrefillRun(model, prompt(N), settings, is_long=False)
    run.compute_layer()
    left_then = run.layer_tokens_left - run.next_layer_tokens
    run.compute_layer()
    assert run.result().report.selection_layer == 1
    assert run.layer_tokens_left < left_then
