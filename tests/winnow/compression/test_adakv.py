from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow import naive, naive_rivals
from tests.winnow.naive import UNIT
from winnow.compression import compression_rule
from winnow.pruning_settings import PruningSettings

ADAKV = PruningSettings(
    window_size=4, kernel_size=3, kv_budget=8, select_tokens=8, compression="adakv"
)


@settings(max_examples=300)
@given(
    num_kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    window=st.integers(1, 5),
    more=st.integers(2, 40),
    kernel_size=st.sampled_from([1, 3, 7]),
    largest=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**32),
)
def test_keeps_what_the_formula_keeps_within_the_promised_memory(
    num_kv_heads: int,
    group: int,
    window: int,
    more: int,
    kernel_size: int,
    largest: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (num_kv_heads * group, window + more)
    mass = torch.randint(0, largest, size, generator=generator).float() * UNIT
    mass *= torch.randint(1, 4, (len(mass), 1), generator=generator)  # heads of different weight
    budget = window + 1 + seed % (more - 1)
    config = replace(ADAKV, window_size=window, kernel_size=kernel_size, kv_budget=budget)
    rule = compression_rule(config)
    kept = [head.tolist() for head in rule.keep(mass, num_kv_heads)]
    assert kept == naive_rivals.adakv(
        naive.as_lists(mass), num_kv_heads, window, kernel_size, budget
    )
    assert sum(map(len, kept)) == num_kv_heads * budget
    assert max(map(len, kept)) <= rule.max_entries(window + more, num_kv_heads)


def test_a_head_with_all_of_the_attention_leaves_the_others_their_safeguard() -> None:
    mass = torch.zeros(4, 200)
    mass[:, -4:] = 1
    mass[2, :-4] = 1
    config = replace(ADAKV, kv_budget=24)  # 20 beside the window, 4 of them certain
    rule = compression_rule(config)
    kept = rule.keep(mass, 4)
    assert [len(head) for head in kept] == [8, 8, 72, 8]
    assert rule.max_entries(200, 4) == 72


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_one_token_over_the_budget_drops_the_worst_of_the_layer(num_kv_heads: int) -> None:
    mass = torch.arange(40.0).repeat(num_kv_heads, 1) + 1
    mass[0, 17] = 0
    config = replace(ADAKV, kernel_size=1, kv_budget=39)
    kept = compression_rule(config).keep(mass, num_kv_heads)
    everything = list(range(40))
    assert kept[0].tolist() == [token for token in everything if token != 17]
    assert [len(head) for head in kept] == [39] * num_kv_heads


def test_one_head_alone_keeps_what_snapkv_keeps() -> None:
    mass = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    shared, same = (
        compression_rule(replace(ADAKV, compression=compression)).keep(mass, 1)[0].tolist()
        for compression in ("adakv", "snapkv")
    )
    assert shared == same


@pytest.mark.parametrize(
    ("changes", "num_tokens", "num_kv_heads", "most"),
    [
        ({}, 8, 4, 8),
        ({"kv_budget": None}, 50, 4, 50),
        ({}, 9, 4, 9),  # all 5 beside the window: (4 * 5 + 4) / 5, rounded up
        ({}, 1000, 1, 8),
        ({}, 1000, 2, 12),  # (4 * 8 + 4) / 5 = 7.2, rounded up, and the window
    ],
)
def test_promises_what_one_head_can_come_to_keep(
    changes: dict[str, Any], num_tokens: int, num_kv_heads: int, most: int
) -> None:
    assert compression_rule(replace(ADAKV, **changes)).max_entries(num_tokens, num_kv_heads) == most
