from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow import naive
from tests.winnow.naive import UNIT
from winnow.attention import AttentionOptions
from winnow.compression import compression_rule
from winnow.pruning_settings import PruningSettings
from winnow.scoring import observed_attention

BASE = PruningSettings(window_size=4, kernel_size=3, kv_budget=8, select_tokens=8)


@settings(max_examples=200)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([1, 3, 7]),
    st.integers(0, 2**32),
)
def test_snapkv_keeps_what_the_formula_keeps(
    num_kv_heads: int, group: int, window: int, more: int, kernel_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (num_kv_heads * group, window + more)
    mass = torch.randint(0, 5, size, generator=generator).float() * UNIT
    budget = window + 1 + seed % more
    config = replace(BASE, window_size=window, kernel_size=kernel_size, kv_budget=budget)
    kept = [head.tolist() for head in compression_rule(config).keep(mass, num_kv_heads)]
    assert kept == naive.snapkv(naive.as_lists(mass), num_kv_heads, window, kernel_size, budget)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_with_the_mass(p: float) -> None:
    torch.manual_seed(3)
    queries, keys = torch.randn(4, 4, 8) * 2, torch.randn(2, 50, 8) * 2
    mass = observed_attention(queries, keys, AttentionOptions(8**-0.5))
    config = replace(BASE, compression="top_p", kv_top_p=p)
    kept = [head.tolist() for head in compression_rule(config).keep(mass, 2)]
    assert kept == naive.top_p(naive.as_lists(mass), 2, 4, p)
    if p == 0.9:
        assert len(kept[0]) != len(kept[1]), "heads of this case differ in length"


@pytest.mark.parametrize(
    ("changes", "num_tokens", "whole"),
    [
        ({"compression": "none"}, 1000, True),
        ({"kv_budget": None}, 1000, True),
        ({"kv_budget": 8}, 8, True),
        ({"kv_budget": 8}, 9, False),
        ({"compression": "top_p"}, 4, True),
        ({"compression": "top_p"}, 5, False),
        ({"compression": "top_p", "kv_top_p": 1.0}, 1000, True),
    ],
)
def test_knows_when_a_layer_stays_whole(
    changes: dict[str, Any], num_tokens: int, whole: bool
) -> None:
    config = replace(BASE, **changes)
    rule = compression_rule(config)
    assert rule.keeps_all(num_tokens) is whole
    if whole:
        kept = rule.keep(torch.rand(2, num_tokens), 2)
        assert [head.tolist() for head in kept] == [list(range(num_tokens))] * 2
