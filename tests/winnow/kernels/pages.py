"""Pages of a layer as the pool has them, for rows whose heads have any lengths."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.variant import PLAIN, Variant
from winnow.kv_quantization import quantize


@dataclass(frozen=True, slots=True)
class Pages:
    """keys, values: [num_pages, page_size, D], NaN where no entry is.

    slots, lengths: [B, H_kv], pages: [num_rows, H_kv, P] and rows [B], as in a StepPlan; the rows
    are in no order.
    positions: [num_pages, page_size] int32, with gaps.
    scales: of int8 keys and values, [num_pages, page_size, 2].
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    pages: Tensor
    rows: Tensor
    lengths: Tensor
    positions: Tensor
    scales: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        """What entries consist of."""
        return [self.keys, self.values] + ([] if self.scales is None else [self.scales])

    def copy(self) -> "Pages":
        scales = None if self.scales is None else self.scales.clone()
        return replace(self, keys=self.keys.clone(), values=self.values.clone(), scales=scales)

    def quantized(self) -> "Pages":
        """The same entries as int8; where none is, a scale of NaN."""
        levels, scales = quantize(torch.stack([self.keys, self.values]))
        scales = scales.movedim(0, -1).contiguous()
        return replace(self, keys=levels[0], values=levels[1], scales=scales)

    def row(self, idx: int) -> "Pages":
        """The same pages for one row alone, whose table is as wide as its own entries need."""
        own = slice(idx, idx + 1)
        width = -(-int(self.lengths[own].max()) // self.keys.shape[1])
        pages = self.pages[self.rows[own], :, :width].contiguous()
        return replace(
            self,
            slots=self.slots[own],
            pages=pages,
            rows=torch.zeros(1, dtype=torch.int64),
            lengths=self.lengths[own],
        )

    def arguments(self, scaling: float, variant: Variant = PLAIN) -> tuple[Any, ...]:
        """Of `append_and_attend`, after the step's query, keys and values."""
        most = max(int(self.lengths.max()), 1)
        at = (self.slots, self.pages, self.rows, self.lengths, most)
        return (self.keys, self.values, *at, scaling, self.scales, variant)

    def seen(self, positions: int) -> Variant:
        """That each row sees its newest entry and what is less than so many positions before it."""
        newest = self.positions.flatten()[self.slots].amax(1)
        return Variant((newest.long() + 1 - positions).clamp_min(0), self.positions)


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
    steps = torch.randint(1, 4, slots.shape)
    # The newest entries of a row's heads have one position.
    ends = steps.cumsum(-1).gather(-1, newest[..., None])
    ascending = steps.cumsum(-1) + ends.amax(1, keepdim=True) - ends
    positions = torch.full((num_pages * page_size,), -1, dtype=torch.int32)
    positions[slots] = ascending.int()
    rows = torch.randperm(len(lengths) + 1)[:-1]
    table = pages.new_zeros((len(lengths) + 1, *pages.shape[1:])).index_copy(0, rows, pages)
    return Pages(
        keys.to(dtype),
        values.to(dtype),
        new_slots,
        table,
        rows,
        wanted.int(),
        positions.view(-1, page_size),
    )
