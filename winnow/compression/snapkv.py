"""SnapKV (arXiv 2404.14469): each KV head keeps the entries that the window attends to most."""

from torch import Tensor

from winnow.compression.base import BudgetRule, RecompressionRule
from winnow.scoring import (
    descending_order,
    observed_attention,
    pooled_scores,
    sum_head_groups,
    with_window,
)


class SnapKVRule(BudgetRule):
    """Keeps the `kv_budget - window_size` best entries of each head, and the window."""

    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        settings = self.settings
        return keep_best(
            mass, num_kv_heads, settings.window_size, settings.kernel_size, self.kv_budget
        )


class SnapKVRecompression(RecompressionRule):
    """As SnapKVRule, with the last tokens of the sequence as the window."""

    def keep(self, keys: Tensor, queries: Tensor, scaling: float, num_kept: int) -> Tensor:
        mass = observed_attention(queries, keys[None], scaling)
        return keep_best(mass, 1, queries.shape[1], self.settings.kernel_size, num_kept)[0]


def keep_best(
    mass: Tensor, num_kv_heads: int, window_size: int, kernel_size: int, kv_budget: int
) -> list[Tensor]:
    """Per KV head, the `kv_budget - window_size` best entries and the window, ascending.

    mass: [num_heads, num_tokens] observed attention, num_tokens > kv_budget > window_size.
    Returns num_kv_heads tensors [kv_budget] int64.
    """
    scores = sum_head_groups(pooled_scores(mass, window_size, kernel_size), num_kv_heads)
    best = descending_order(scores)[:, : kv_budget - window_size]
    return [with_window(head, mass.shape[1], window_size) for head in best]
