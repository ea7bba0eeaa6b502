"""What recompression keeps of one KV head, by formulas over plain numbers (see naive.py)."""

import torch
from torch import Tensor

from tests.winnow import naive, naive_rivals
from winnow.kv import LayerKV
from winnow.pruning_settings import Recompression

_ROUNDING = 1e-6  # scores that differ by less may be ranked either way


def scores(keys: Tensor, queries: Tensor, settings: Recompression) -> list[float]:
    """Of the entries before the window.  keys: [T, D] of one head; queries: [group, w, D]."""
    window, kernel_size, weight = (
        queries.shape[1],
        settings.kernel_size,
        settings.redundancy_weight,
    )
    if settings.method == "snapkv":
        mass = naive.observed_attention(queries, keys[None])
        rows = naive.pooled(mass, window, kernel_size)
        return [sum(column) for column in zip(*rows, strict=True)]
    candidates = keys[: len(keys) - window]
    attended = naive_rivals.rkv_importance(queries, candidates, kernel_size)
    redundant = naive_rivals.rkv_redundancy(candidates)
    pairs = zip(attended, redundant, strict=True)
    return [weight * one - (1 - weight) * other for one, other in pairs]


def assert_keeps_the_best(
    keys: Tensor, queries: Tensor, kept: list[int], settings: Recompression, budget: int
) -> None:
    """A head within the budget keeps all; a longer one its window and the best of the others.

    keys: [T, D] of one head; queries: [group, w, D].  kept: indices.
    """
    if len(keys) <= budget:
        assert kept == list(range(len(keys)))
        return
    num_before = len(keys) - queries.shape[1]
    assert kept == sorted(set(kept))
    assert len(kept) == budget
    assert kept[budget - queries.shape[1] :] == list(range(num_before, len(keys)))
    own = scores(keys, queries, settings)
    worst = min(own[entry] for entry in kept if entry < num_before)
    assert worst >= max(own[entry] for entry in range(num_before) if entry not in kept) - _ROUNDING


def assert_cut(before: LayerKV, after: LayerKV, settings: Recompression, budget: int) -> None:
    """Each head of a layer keeps the best, by its queries.  Its positions count from 0."""
    keys = before.dequantized(before.window_queries.dtype).keys
    groups = before.window_queries.chunk(len(before.head_lengths))
    pairs = zip(before.head_slices(), after.head_slices(), groups, strict=True)
    for own, left, queries in pairs:
        kept = after.positions[left].tolist()
        assert_keeps_the_best(keys[own], queries, kept, settings, budget)
        assert torch.equal(after.keys[left], before.keys[own][kept])
        assert torch.equal(after.values[left], before.values[own][kept])
        if before.scales is not None and after.scales is not None:
            assert torch.equal(after.scales[left], before.scales[own][kept])
