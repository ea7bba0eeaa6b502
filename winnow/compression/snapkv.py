"""SnapKV (arXiv 2404.14469): each KV head keeps the entries that the window attends to most."""

import torch.nn.functional as F
from torch import Tensor

from winnow.compression.base import BudgetRule, RecompressionRule
from winnow.compression.heads import PagedHeads
from winnow.scoring import descending_order, pooled_scores, sum_head_groups, with_window


class SnapKVRule(BudgetRule):
    """Keeps the `kv_budget - window_size` best entries of each head, and the window."""

    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        settings = self.settings
        return keep_best(
            mass, num_kv_heads, settings.window_size, settings.kernel_size, self.kv_budget
        )


class SnapKVRecompression(RecompressionRule):
    """As SnapKVRule, with the last tokens of the sequence as the window."""

    def scores(self, heads: PagedHeads) -> Tensor:
        before_window = heads.window_scores().masked_fill_(~heads.is_candidate(), 0)
        kernel_size = self.settings.kernel_size
        return F.avg_pool1d(before_window, kernel_size, stride=1, padding=kernel_size // 2)


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
