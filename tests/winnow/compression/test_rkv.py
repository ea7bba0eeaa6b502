import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow import naive_recompression, naive_rivals
from tests.winnow.compression.one_head import kept_of
from tests.winnow.naive import by_score
from winnow.compression.rkv import importance, redundancy
from winnow.pruning_settings import Recompression

SCALING = 8**-0.5


def random_head(num_entries: int, window: int, group: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_entries, 8, generator=generator)
    return keys, torch.randn(group, window, 8, generator=generator)


def all_of(keys: Tensor) -> Tensor:
    return torch.ones(1, len(keys), dtype=torch.bool)


def keys_with_exact_cosines(num_entries: int, seed: int) -> Tensor:
    """Of length 2 or 0 with entries -1, 0, 1: every cosine is a multiple of 1 / 4, many tie."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.zeros(num_entries, 6)
    for key in keys:
        places = torch.randperm(6, generator=generator)[:4]
        key[places] = torch.randint(0, 2, (4,), generator=generator).float() * 2 - 1
    keys[torch.rand(num_entries, generator=generator) < 0.05] = 0
    return keys


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(("n", "kernel_size"), [(1, 1), (2, 7), (20, 1), (20, 7), (5, 21)])
def test_importance_equals_the_formula(n: int, kernel_size: int, window: int, group: int) -> None:
    keys, queries = random_head(n, window, group, seed=n)
    expected = torch.tensor(naive_rivals.rkv_importance(queries, keys, kernel_size))
    found = importance(keys[None], all_of(keys), queries[None], SCALING, kernel_size)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=100)
@given(num_entries=st.integers(1, 25), block=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_redundancy_equals_the_formula_in_blocks_of_any_size(
    num_entries: int, block: int, seed: int
) -> None:
    keys = keys_with_exact_cosines(num_entries, seed)
    found = redundancy(keys[None], all_of(keys), block)[0]
    expected = torch.tensor(naive_rivals.rkv_redundancy(keys))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_of_equal_keys_the_last_is_not_redundant() -> None:
    keys = torch.eye(8)[:5]
    keys[[1, 3]] = keys[0].clone()
    scores = redundancy(keys[None], all_of(keys), 8)[0]
    assert scores[3] == scores[2] == scores[4], "as those that are like no other"
    assert scores[3] < scores[1] < scores[0]


@settings(max_examples=50)
@given(num_entries=st.lists(st.integers(0, 12), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_heads_beside_longer_ones_score_as_alone(num_entries: list[int], seed: int) -> None:
    """What is behind a head's last candidate, NaN too, changes nothing."""
    heads = [random_head(num, 2, 3, seed + idx) for idx, num in enumerate(num_entries)]
    padded = torch.full((len(heads), 14, 8), torch.nan)
    for own, (keys, _) in zip(padded, heads, strict=True):
        own[: len(keys)] = keys
    is_candidate = torch.arange(14) < torch.tensor(num_entries)[:, None]
    queries = torch.stack([queries for _, queries in heads])
    attended = importance(padded, is_candidate, queries, SCALING, 3)
    redundant = redundancy(padded, is_candidate, 5)
    for idx, (keys, own) in enumerate(heads):
        if len(keys):
            alone = importance(keys[None], all_of(keys), own[None], SCALING, 3)[0]
            torch.testing.assert_close(attended[idx, : len(keys)], alone)
            alone = redundancy(keys[None], all_of(keys), 5)[0]
            torch.testing.assert_close(redundant[idx, : len(keys)], alone)


@settings(max_examples=100)
@given(
    window=st.integers(1, 4),
    more=st.integers(2, 20),
    seed=st.integers(0, 2**32),
)
def test_redundancy_alone_keeps_what_the_formula_keeps(window: int, more: int, seed: int) -> None:
    keys = keys_with_exact_cosines(window + more, seed)
    budget = window + 1 + seed % (more - 1)
    asked = Recompression(method="rkv", redundancy_weight=0.0)
    kept = kept_of(keys, torch.zeros(2, window, 6), budget, asked)
    scores = [-value for value in naive_rivals.rkv_redundancy(keys[:more])]
    scores = [round(value, 9) for value in scores]  # ties are ties, however the sum is rounded
    best = sorted(by_score(scores)[: budget - window])
    assert kept == best + list(range(more, window + more))


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize(
    ("num_entries", "window", "group", "budget", "kernel_size"),
    [(40, 4, 2, 12, 3), (40, 1, 1, 2, 7), (13, 4, 3, 12, 3), (6, 1, 2, 3, 21)],
)
def test_keeps_the_best_by_both_and_the_window(
    num_entries: int, window: int, group: int, budget: int, kernel_size: int, weight: float
) -> None:
    keys, queries = random_head(num_entries, window, group, seed=num_entries)
    asked = Recompression(method="rkv", kernel_size=kernel_size, redundancy_weight=weight)
    kept = kept_of(keys, queries, budget, asked)
    scores = [round(value, 7) for value in naive_recompression.scores(keys, queries, asked)]
    best = sorted(by_score(scores)[: budget - window])  # max-pooling makes ties
    assert kept == best + list(range(num_entries - window, num_entries))


def test_keeps_of_a_repeated_phrase_what_attention_alone_would_not() -> None:
    keys, queries = random_head(20, 4, 2, seed=3)
    keys[2:8] = keys[1]  # seven times the same
    queries[:] = keys[1] * 2  # and the window asks for just that
    copies = {
        method: sum(
            1 <= entry < 8
            for entry in kept_of(keys, queries, 12, Recompression(method=method, kernel_size=1))
        )
        for method in ("snapkv", "rkv")
    }
    assert copies["snapkv"] == 7
    assert 1 <= copies["rkv"] < 7
