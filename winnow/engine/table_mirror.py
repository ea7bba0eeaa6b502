"""TableMirror: the device's copy of the page table, which lives on the host (page_table.py).

Each step sends what has changed of its rows since they were last sent. What a step does to every
row alike, one more entry per head, the device does itself. It also moves the pages of heads that
have lost their first ones.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from winnow.attention import StepPlan
from winnow.engine.page_table import TableChanges
from winnow.engine.windows import Windows
from winnow.kv import ModelShape
from winnow.to_device import array_to_device

_FIRST_WIDTH = 128


class TableMirror:
    """Pages and lengths of `num_rows` rows, and of one more, `dummy_row`, that holds nothing.

    pages: [L, num_rows + 1, H_kv, width] int64: with int32 the attention kernel takes more
    registers.  Those beyond a head's length mean nothing.
    lengths: [L, num_rows + 1, H_kv] int32.
    Both are replaced by wider ones, rarely, as the longest head grows.
    """

    def __init__(
        self, shape: ModelShape, page_size: int, num_rows: int, device: torch.device
    ) -> None:
        self.dummy_row = num_rows
        self._page_size = page_size
        windows = Windows(shape, page_size)
        self._windowed_width = windows.width
        has_head = array_to_device(windows.has_head, device)
        self._added = has_head.int()[:, None]  # [L, 1, H_kv], entries that a step adds
        heads = (shape.num_layers, num_rows + 1, shape.num_kv_heads)
        self.lengths = torch.zeros(heads, dtype=torch.int32, device=device)
        self.pages = self.lengths.new_zeros((*heads, _FIRST_WIDTH), dtype=torch.int64)
        self._heads = torch.arange(self.lengths.numel(), device=device).view(heads)

    @property
    def width(self) -> int:
        """Pages that a head has room for."""
        return self.pages.shape[-1]

    def widen(self, width: int) -> None:
        """Have room for so many pages per head."""
        narrow = self.pages
        if width > self.width:
            doubled = 1 << (width - 1).bit_length()
            self.pages = narrow.new_zeros((*narrow.shape[:-1], doubled))
            self.pages[..., : narrow.shape[-1]] = narrow

    def missing(self, changes: TableChanges) -> list[ArrayLike]:
        """What `update` needs to be told, as arrays to send; empty if nothing is missing."""
        if not (len(changes.pages) or len(changes.lengths) or len(changes.lost)):
            return []
        self.widen(changes.width)
        page_at = np.ravel_multi_index(changes.page_at, self.pages.shape)
        length_at, lost_at = (
            np.ravel_multi_index(at, self.lengths.shape[:2])
            for at in (changes.length_at, changes.lost_at)
        )
        return [changes.pages, page_at, changes.lengths, length_at, changes.lost, lost_at]

    def update(
        self,
        pages: Tensor,
        page_at: Tensor,
        lengths: Tensor,
        length_at: Tensor,
        lost: Tensor,
        lost_at: Tensor,
    ) -> None:
        """Apply what `missing` gave, once it is on the device."""
        if len(lost_at):
            self._lose(lost, lost_at)
        if len(page_at):
            self.pages.view(-1)[page_at] = pages
        if len(length_at):
            self.lengths.flatten(0, 1)[length_at] = lengths.int()

    def _lose(self, lost: Tensor, lost_at: Tensor) -> None:
        """Take from heads their first pages: `lost` [k, H_kv] of the layers' rows at `lost_at`."""
        heads = self.pages.flatten(0, 1)[..., : self._windowed_width]
        column = torch.arange(heads.shape[-1], device=lost.device) + lost[..., None]
        own = heads[lost_at].gather(-1, column.clamp_max(heads.shape[-1] - 1))
        heads[lost_at] = own
        self.lengths.flatten(0, 1)[lost_at] -= (lost * self._page_size).int()

    def add_entries(
        self, rows: Tensor, positions: Tensor, longest: list[int] | None = None
    ) -> StepPlan:
        """Add an entry to each head of the rows [B], on the device alone; where it goes.

        positions, longest: see StepPlan.
        """
        old = self.lengths.index_select(1, rows)  # [L, B, H_kv]
        lengths = old + self._added
        self.lengths.index_copy_(1, rows, lengths)
        column = old // self._page_size
        heads = self._heads.index_select(1, rows)
        last = self.pages.view(-1)[torch.add(column, heads, alpha=self.width)]
        # Heads that a layer lacks write to page 0, which nobody reads.
        slots = torch.add(old, last - column, alpha=self._page_size)
        return StepPlan(rows, positions, slots, self.pages, lengths, longest)

    def empty_dummy(self) -> None:
        """Take away the entries that steps have added to the dummy row."""
        self.lengths[:, self.dummy_row] = 0
