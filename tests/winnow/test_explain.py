"""What an explanation says agrees with what prefill did."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.models_in_code import long_rope, save_tiny_model
from tests.winnow.adapters.made import save_adapter
from tests.winnow.drive import prefill_all
from winnow import SamplingParams, Winnow
from winnow.catalog import METHODS
from winnow.engine.prefill import PrefillRun
from winnow.engine.score_watch import ScoreWatch
from winnow.errors import InvalidRequest
from winnow.explain import Explanation, explain

TEXT = "the quick brown fox jumps over the lazy dög – 漢字 " * 10
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "fastkv": {"fixed_layer": 1},
    "gemfilter": {"fixed_layer": 1},
    "asl": {"min_layer": 1, "observed_layers": 2, "latest_layer": 2, "threshold": 0.9},
    "asl-2pass": {"min_layer": 1, "observed_layers": 2, "latest_layer": 2, "threshold": 0.9},
}
BUDGETS: dict[str, Any] = {"select_tokens": 48, "kv_budget": 32, "window_size": 8, "kernel_size": 3}
SAMPLING = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


def _explained(folder: Path, method: str) -> tuple[Winnow, list[int], Explanation]:
    winnow = Winnow.load(folder, method=method, **BUDGETS, **SETTINGS.get(method, {}))
    token_ids = winnow.tokenizer.encode(TEXT)
    return winnow, token_ids, explain(winnow, token_ids, SAMPLING)


@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_the_prefill_of_the_same_prompt(
    method: str, tiny_models: dict[str, Path]
) -> None:
    winnow, token_ids, explanation = _explained(tiny_models["llama"], method)
    _, result = prefill_all(winnow.model, token_ids, winnow.pruning)
    assert explanation.report == result.report
    assert "".join(explanation.pieces) == TEXT
    assert len(explanation.pieces) == len(explanation.scores.last_layers) == len(token_ids)
    assert explanation.answer.token_ids == winnow.generate(TEXT, SAMPLING).token_ids
    full = Winnow.load(tiny_models["llama"], method="full").generate(TEXT, SAMPLING)
    assert explanation.full_answer.token_ids == full.token_ids
    assert explanation.prefill_s > 0 < explanation.full_prefill_s


@pytest.mark.parametrize("family", ["llama", "gemma4", "mimo_v2_flash", "lfm2"])
def test_layers_are_told_by_their_own_sizes(family: str, tmp_path: Path) -> None:
    _, token_ids, found = _explained(save_tiny_model(tmp_path, family), "full")
    assert found.report.layer_entries == found.layer_entries_full
    assert sum(found.layer_bytes) == found.report.kv_bytes_kept == found.report.kv_bytes_full
    is_alike = len({*found.layer_entries_full}) == 1
    assert is_alike == (family == "llama")
    assert max(found.layer_entries_full) <= len(token_ids) * found.num_kv_heads


def test_a_prompt_is_explained_by_the_tables_that_its_answer_is_computed_with(
    tmp_path: Path,
) -> None:
    winnow = Winnow.load(
        save_tiny_model(tmp_path, "phi3", **long_rope(600)), **BUDGETS, **SETTINGS["asl"]
    )
    token_ids = winnow.tokenizer.encode(TEXT)
    found = {}
    for is_long in (False, True):
        scores = ScoreWatch(winnow.pruning, len(token_ids), winnow.model.shape)
        run = PrefillRun(winnow.model, token_ids, winnow.pruning, scores, is_long=is_long)
        list(run.layers())
        found[is_long] = scores.result().scores.tolist()
    for max_tokens in (3, 100):
        sampling = dataclasses.replace(SAMPLING, max_tokens=max_tokens)
        is_long = len(token_ids) + max_tokens > 600
        assert explain(winnow, token_ids, sampling).scores.scores.tolist() == found[is_long]
    assert found[False] != found[True]


@pytest.mark.parametrize("method", ["fastkv", "asl"])
def test_tells_which_tokens_went_on(method: str, tiny_models: dict[str, Path]) -> None:
    winnow, token_ids, explanation = _explained(tiny_models["llama"], method)
    deeper = dataclasses.replace(winnow.pruning, kv_budget=1000)  # every selected token's KV kept
    layers, result = prefill_all(winnow.model, token_ids, deeper)
    layer = result.report.selection_layer
    assert layer is not None
    kept = [i for i, last in enumerate(explanation.scores.last_layers) if last > layer]
    assert kept == layers[layer + 1].positions[: len(kept)].tolist()
    assert layers[layer + 1].head_lengths == (len(kept), len(kept))
    assert set(explanation.scores.last_layers.tolist()) == {layer, len(layers) - 1}


@pytest.mark.parametrize("method", ["fastkv", "asl"])
def test_the_kept_are_the_first_in_the_order(method: str, tiny_models: dict[str, Path]) -> None:
    winnow, token_ids, explanation = _explained(tiny_models["llama"], method)
    layer, scores = explanation.report.selection_layer, explanation.layer_ranks[-1]
    assert scores.layer_idx == layer
    num_ranked = len(token_ids) - winnow.pruning.window_size
    assert sorted(scores.ranks) == [0] * winnow.pruning.window_size + [*range(1, num_ranked + 1)]
    assert not any(scores.ranks[num_ranked:])  # the window is kept whatever its scores
    kept = {i for i, last in enumerate(explanation.scores.last_layers[:num_ranked]) if last > layer}
    best = BUDGETS["select_tokens"] - winnow.pruning.window_size
    assert kept == {i for i, rank in enumerate(scores.ranks[:num_ranked]) if 0 < rank <= best}


def test_nothing_is_dropped_where_nothing_is_pruned(tiny_models: dict[str, Path]) -> None:
    _, _, explanation = _explained(tiny_models["llama"], "full")
    assert set(explanation.scores.last_layers.tolist()) == {3}
    assert explanation.report.no_selection_reason == "off"


def test_refuses_what_generate_refuses(tiny_models: dict[str, Path]) -> None:
    winnow = Winnow.load(tiny_models["llama"])
    with pytest.raises(InvalidRequest, match="0 tokens"):
        explain(winnow, [], SAMPLING)
    with pytest.raises(InvalidRequest, match="9,000"):
        explain(winnow, [5] * 9000, SAMPLING)


def test_explains_what_an_adapter_does(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, tiny_models["llama"])
    winnow = Winnow.load(tiny_models["llama"], adapters={"law": folder}, **BUDGETS)
    token_ids = winnow.tokenizer.encode(TEXT)
    own, others = (explain(winnow, token_ids, SAMPLING, adapter) for adapter in ("law", None))
    answers = [winnow.generate(token_ids, SAMPLING, adapter=name) for name in ("law", None)]
    assert [own.answer.token_ids, others.answer.token_ids] == [one.token_ids for one in answers]
    assert own.report.rho == answers[0].report.rho
    assert own.layer_ranks != others.layer_ranks
