import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow import naive_rivals
from tests.winnow.naive import by_score
from winnow.compression import recompression_rule, rkv
from winnow.compression.recompress import recompress_layer
from winnow.compression.rkv import importance, keep_diverse, redundancy
from winnow.kv import LayerKV
from winnow.pruning_settings import Recompression

SCALING = 8**-0.5


def random_head(num_entries: int, window: int, group: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_entries, 8, generator=generator)
    return keys, torch.randn(group, window, 8, generator=generator)


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
    torch.testing.assert_close(
        importance(keys, queries, SCALING, kernel_size), expected, rtol=1e-5, atol=1e-6
    )


@settings(max_examples=100)
@given(num_entries=st.integers(1, 25), block=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_redundancy_equals_the_formula_in_blocks_of_any_size(
    num_entries: int, block: int, seed: int
) -> None:
    keys = keys_with_exact_cosines(num_entries, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rkv, "_BLOCK_SIZE", block)
        found = redundancy(keys)
    expected = torch.tensor(naive_rivals.rkv_redundancy(keys))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_of_equal_keys_the_last_is_not_redundant() -> None:
    keys = torch.eye(8)[:5]
    keys[[1, 3]] = keys[0].clone()
    scores = redundancy(keys)
    assert scores[3] == scores[2] == scores[4], "as those that are like no other"
    assert scores[3] < scores[1] < scores[0]


@settings(max_examples=100)
@given(
    window=st.integers(1, 4),
    more=st.integers(2, 20),
    seed=st.integers(0, 2**32),
)
def test_redundancy_alone_keeps_what_the_formula_keeps(window: int, more: int, seed: int) -> None:
    keys = keys_with_exact_cosines(window + more, seed)
    queries = torch.zeros(2, window, 6)
    budget = window + 1 + seed % (more - 1)
    kept = keep_diverse(keys, queries, SCALING, 3, budget, redundancy_weight=0.0)
    scores = [-value for value in naive_rivals.rkv_redundancy(keys[:more])]
    scores = [round(value, 9) for value in scores]  # ties are ties, however the sum is rounded
    best = sorted(by_score(scores)[: budget - window])
    assert kept.tolist() == best + list(range(more, window + more))


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize(
    ("num_entries", "window", "group", "budget", "kernel_size"),
    [(40, 4, 2, 12, 3), (40, 1, 1, 2, 7), (13, 4, 3, 12, 3), (6, 1, 2, 3, 21)],
)
def test_keeps_the_best_by_both_and_the_window(
    num_entries: int, window: int, group: int, budget: int, kernel_size: int, weight: float
) -> None:
    keys, queries = random_head(num_entries, window, group, seed=num_entries)
    kept = keep_diverse(keys, queries, SCALING, kernel_size, budget, weight)
    candidates = keys[: num_entries - window]
    attended = naive_rivals.rkv_importance(queries, candidates, kernel_size)
    redundant = naive_rivals.rkv_redundancy(candidates)
    scores = [
        round(weight * one - (1 - weight) * other, 7)  # max-pooling makes ties
        for one, other in zip(attended, redundant, strict=True)
    ]
    best = sorted(by_score(scores)[: budget - window])
    assert kept.tolist() == best + list(range(num_entries - window, num_entries))


def test_recompression_keeps_of_a_repeated_phrase_what_attention_alone_would_not() -> None:
    """Long heads are cut to diverse entries, each by its own queries; short heads stay."""
    lengths, window = (20, 9), 4
    keys, queries = random_head(sum(lengths), window, 4, seed=3)
    keys[2:8] = keys[1]  # seven times the same
    queries[:2] = keys[1] * 2  # and the window asks for just that
    layer = LayerKV(
        layer_idx=0,
        keys=keys,
        values=torch.randn(sum(lengths), 8),
        positions=torch.arange(sum(lengths), dtype=torch.int32),
        head_lengths=lengths,
        window_queries=queries,
    )
    cuts = {
        method: recompress_layer(
            layer, SCALING, recompression_rule(Recompression(method=method, kernel_size=1)), 12
        )
        for method in ("snapkv", "rkv")
    }
    assert [cut.head_lengths for cut in cuts.values()] == [(12, 9), (12, 9)]
    copies = {
        name: sum(1 <= position < 8 for position in cut.positions[:12].tolist())
        for name, cut in cuts.items()
    }
    assert copies["snapkv"] == 7
    assert 1 <= copies["rkv"] < 7
    expected = keep_diverse(keys[:20], queries[:2], SCALING, 1, 12, 0.1).tolist()
    assert cuts["rkv"].positions.tolist() == expected + list(range(20, 29))
    torch.testing.assert_close(cuts["rkv"].values, layer.values[cuts["rkv"].positions.long()])
