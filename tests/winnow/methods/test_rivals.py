import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models_in_code import FAMILIES
from tests.winnow import naive, naive_rivals, reference
from tests.winnow.drive import prefill_all, prompt
from tests.winnow.methods.small_runs import SMALL
from tests.winnow.naive import UNIT
from winnow import scoring
from winnow.attention import AttentionOptions, PrefillAttention
from winnow.decoder import DecoderModel
from winnow.kv import LayerKV
from winnow.methods.base import LayerView
from winnow.methods.h2o import keep_heavy_hitters
from winnow.methods.pyramidinfer import context_lengths, context_scores
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.scoring import accumulated_attention

H2O = replace(SMALL, method="h2o")
STREAMING = replace(SMALL, method="streaming")
PYRAMID = replace(SMALL, method="pyramidinfer")


def positions(layer: LayerKV) -> list[list[int]]:
    """Per KV head."""
    return [layer.positions[rows].tolist() for rows in layer.head_slices()]


# H2O


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize(("num_tokens", "block"), [(1, 4), (4, 4), (5, 4), (30, 7), (30, 256)])
def test_accumulated_attention_equals_the_formula_in_blocks_of_any_size(
    num_heads: int,
    num_kv_heads: int,
    num_tokens: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(num_tokens)
    queries = torch.randn(num_heads, num_tokens, 8)
    keys = torch.randn(num_kv_heads, num_tokens, 8)
    monkeypatch.setattr(scoring, "_QUERY_BLOCK", block)
    mass = accumulated_attention(queries, keys, AttentionOptions(8**-0.5))
    expected = torch.tensor(naive_rivals.accumulated_attention(queries, keys))
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.sum(1), torch.full((num_heads,), float(num_tokens)))


@settings(max_examples=200)
@given(
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    num_recent=st.integers(1, 8),
    heavy=st.integers(1, 20),
    more=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_heavy_hitters_are_those_of_the_formula(
    num_kv_heads: int, group: int, num_recent: int, heavy: int, more: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (num_kv_heads * group, num_recent + heavy + more)
    mass = torch.randint(0, 5, size, generator=generator).float() * UNIT
    budget = num_recent + heavy
    kept = [head.tolist() for head in keep_heavy_hitters(mass, num_kv_heads, num_recent, budget)]
    assert kept == naive_rivals.h2o(naive.as_lists(mass), num_kv_heads, num_recent, budget)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "num_recent"),
    [({}, 10), ({"kv_budget": 59}, 29), ({"kv_budget": 9}, 8), ({"window_size": 1}, 10)],
)
def test_h2o_keeps_what_transformers_attention_accumulates_on(
    tiny_models: dict[str, Path], family: str, changes: dict[str, Any], num_recent: int
) -> None:
    config, token_ids = replace(H2O, **changes), prompt(60)
    network = reference.load(tiny_models[family], "eager")
    masses = reference.attention_masses(network, token_ids, window=60)
    layers, _ = prefill_all(load_model(tiny_models[family]), token_ids, config)
    for layer, mass in zip(layers, masses, strict=True):
        assert config.kv_budget is not None
        expected = naive_rivals.h2o(naive.as_lists(mass), 2, num_recent, config.kv_budget)
        assert positions(layer) == expected


# StreamingLLM


@pytest.mark.parametrize(
    ("changes", "num_tokens", "num_sinks"),
    [
        ({}, 60, 4),
        ({}, 21, 4),
        ({"kv_budget": 11}, 60, 3),
        ({"kv_budget": 9}, 60, 1),
        ({"kv_budget": 2, "window_size": 1}, 60, 1),
    ],
)
def test_streaming_keeps_the_sinks_and_the_last(
    tiny_models: dict[str, Path], changes: dict[str, Any], num_tokens: int, num_sinks: int
) -> None:
    config = replace(STREAMING, **changes)
    layers, _ = prefill_all(load_model(tiny_models["llama"]), prompt(num_tokens), config)
    assert config.kv_budget is not None
    first_recent = num_tokens - (config.kv_budget - num_sinks)
    expected = list(range(num_sinks)) + list(range(first_recent, num_tokens))
    assert [positions(layer) for layer in layers] == [[expected, expected]] * 4


# PyramidInfer


@settings(max_examples=300)
@given(
    num_layers=st.integers(1, 80),
    budget=st.integers(1, 3000),
    more=st.integers(1, 30_000),
)
def test_context_lengths_fall_by_the_schedule_to_the_budgets_mean(
    num_layers: int, budget: int, more: int
) -> None:
    num_context = budget + more
    lengths = context_lengths(num_context, budget, num_layers)
    shortest = min(64, budget // 2)
    assert len(lengths) == num_layers
    assert sum(lengths) == budget * num_layers
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] <= num_context
    assert lengths[-1] >= shortest
    # One decay rate explains every length, to within one token of rounding.
    slowest, fastest, depth = 0.0, math.inf, 0.0
    for layer, length in enumerate(lengths, 1):
        depth += (1 - math.cos(math.pi * layer / num_layers)) / 2
        slowest = max(slowest, math.log(num_context / (length + 1)) / depth)
        if length > shortest + 1:
            fastest = min(fastest, math.log(num_context / (length - 1)) / depth)
    assert slowest <= fastest * (1 + 1e-9) or num_layers == 1


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 2), (6, 1)])
def test_context_scores_equal_the_formula(num_heads: int, num_kv_heads: int, window: int) -> None:
    torch.manual_seed(window)
    queries, keys = torch.randn(num_heads, window, 8), torch.randn(num_kv_heads, 30, 8)
    view = LayerView(0, keys, queries, AttentionOptions(8**-0.5), window)
    expected = torch.tensor(naive_rivals.pyramid_scores(queries, keys))
    torch.testing.assert_close(context_scores(view), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def pyramid_by_the_formulas(
    model: DecoderModel, token_ids: list[int], config: PruningSettings, lengths: list[int]
) -> tuple[list[list[int]], list[int], Tensor]:
    """The positions that each layer keeps and computes, and the last token's hidden state."""
    at = torch.arange(len(token_ids))
    hidden, computed, kept = model.embed(torch.tensor([token_ids])), [], []
    for layer_idx, length in enumerate(lengths):
        computed.append(len(at))
        attention = PrefillAttention(config.window_size)
        hidden = model.layer(layer_idx, hidden, model.rope(at[None]), attention)
        context = len(at) - config.window_size
        scores = naive_rivals.pyramid_scores(attention.queries, attention.keys)[:context]
        chosen = sorted(naive.by_score(scores)[:length]) + list(range(context, len(at)))
        at, hidden = at[chosen], hidden[:, chosen]
        kept.append(at.tolist())
    return kept, computed, hidden[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes", [{}, {"kv_budget": 59}, {"kv_budget": 9}, {"window_size": 1, "kv_budget": 2}]
)
def test_pyramidinfer_keeps_and_computes_what_the_formulas_do(
    tiny_models: dict[str, Path], family: str, changes: dict[str, Any]
) -> None:
    config, token_ids = replace(PYRAMID, **changes), prompt(60)
    model = load_model(tiny_models[family])
    assert config.kv_budget is not None
    window = config.window_size
    lengths = context_lengths(60 - window, config.kv_budget - window, 4)
    kept, computed, final_hidden = pyramid_by_the_formulas(model, token_ids, config, lengths)
    layers, result = prefill_all(model, token_ids, config)
    assert [positions(layer) for layer in layers] == [[own, own] for own in kept]
    torch.testing.assert_close(result.final_hidden, final_hidden)
    report = result.report
    assert sum(report.layer_entries) == 2 * 4 * config.kv_budget, "the budget on average"
    assert report.computed_share == sum(computed) / (4 * 60)
    assert report.selection_layer == next(idx for idx, own in enumerate(kept) if len(own) < 60)
    assert (report.num_selected_tokens, report.next_position) == (len(kept[-1]), 60)


@pytest.mark.parametrize("config", [H2O, STREAMING, PYRAMID])
def test_without_a_budget_nothing_is_pruned(
    tiny_models: dict[str, Path], config: PruningSettings
) -> None:
    unbounded = replace(config, kv_budget=None)
    layers, _ = prefill_all(load_model(tiny_models["llama"]), prompt(60), unbounded)
    assert [layer.head_lengths for layer in layers] == [(60, 60)] * 4
