"""Pages of a layer as the pool has them, for rows whose heads have any lengths."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pages:
    """keys, values: [num_pages, page_size, D], NaN where no entry is.

    slots, lengths: [B, H_kv] and pages [B, H_kv, P], as in a StepPlan.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    pages: Tensor
    lengths: Tensor

    def copy(self) -> "Pages":
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

    def row(self, idx: int) -> "Pages":
        """The same pages for one row alone, whose table is as wide as its own entries need."""
        own = slice(idx, idx + 1)
        width = -(-int(self.lengths[own].max()) // self.keys.shape[1])
        pages = self.pages[own, :, :width].contiguous()
        return replace(self, slots=self.slots[own], pages=pages, lengths=self.lengths[own])


def filled_pages(
    lengths: list[list[int]], *, head_dim: int, page_size: int, dtype: torch.dtype
) -> Pages:
    """Random entries in pages that lie in no order.

    lengths: entries of each head of each row, the new one included; its slot is still empty.
    """
    wanted = torch.tensor(lengths)
    width = max(-(-int(wanted.max()) // page_size), 1)
    num_pages = wanted.numel() * width + 1
    pages = (torch.randperm(num_pages - 1) + 1).view(*wanted.shape, width)
    slots = pages[..., None] * page_size + torch.arange(page_size)
    slots = slots.flatten(2)  # [B, H_kv, P * page_size]
    newest = (wanted - 1).clamp_min(0)
    is_old = torch.arange(slots.shape[-1]) < newest[..., None]
    keys, values = (torch.full((num_pages, page_size, head_dim), torch.nan) for _ in range(2))
    for part in (keys, values):
        part.view(-1, head_dim)[slots[is_old]] = torch.randn(int(is_old.sum()), head_dim)
    new_slots = slots.gather(-1, newest[..., None])[..., 0]
    return Pages(keys.to(dtype), values.to(dtype), new_slots, pages, wanted)
