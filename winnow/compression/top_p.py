"""Top-p: each KV head keeps the fewest entries that reach an attention mass; head lengths differ.

The rule is that of nucleus sampling (arXiv 1904.09751), on the window's mean attention.
"""

import torch
from torch import Tensor

from winnow.compression.base import CompressionRule
from winnow.scoring import descending_order


class TopPRule(CompressionRule):
    """Keeps the smallest set of entries per head with attention mass `kv_top_p`."""

    def keeps_all(self, num_tokens: int) -> bool:
        return num_tokens <= self.settings.window_size or self.settings.kv_top_p >= 1

    def max_entries(self, num_tokens: int, num_kv_heads: int) -> int:
        return num_tokens

    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        return keep_mass(mass, num_kv_heads, self.settings.window_size, self.settings.kv_top_p)


def keep_mass(mass: Tensor, num_kv_heads: int, window_size: int, kv_top_p: float) -> list[Tensor]:
    """Per KV head, the smallest set whose mean attention reaches `kv_top_p`, ascending.

    The mean is over the head group and the window's rows, for all columns, without pooling. Token 0
    and the window are always kept.
    mass: [num_heads, num_tokens] observed attention.
    """
    num_tokens = mass.shape[1]
    share = mass.view(num_kv_heads, -1, num_tokens).sum(1)  # [H_kv, N]
    share = share / share.sum(1, keepdim=True)  # without what sinks got
    return [_nucleus(head, window_size, kv_top_p) for head in share]


def _nucleus(share: Tensor, window_size: int, kv_top_p: float) -> Tensor:
    order = descending_order(share)
    mass_before = share[order].cumsum(0) - share[order]
    keep = torch.zeros_like(share, dtype=torch.bool)
    keep[order[mass_before < kv_top_p]] = True
    keep[0] = True
    keep[-window_size:] = True
    return keep.nonzero().squeeze(1)
