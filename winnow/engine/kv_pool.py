"""Paged KV cache of many sequences: what is in the pages. page_table.py keeps whose they are.

A row is a sequence's slot in the batch. Pages are per head, so heads of different lengths waste at
most the rest of their last page. A row's last queries, which recompression scores with, are stored
in pages too, so the pool also bounds them.

Every method may be called from any thread; none waits for the device, except `probe`. Concurrent
writes must be to different rows; so prefill's KV can arrive while other rows decode.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.attention import StepPlan
from winnow.engine.page_table import FIRST_PAGE, Lengths, PageTable
from winnow.errors import InvalidSetting
from winnow.kv import LayerKV, ModelShape
from winnow.to_device import indices_to_device, tensor_to_device


@dataclass(frozen=True, slots=True)
class KVPoolConfig:
    """memory_bytes: for keys, values and positions of all pages; page_size: entries per page.

    overcommit: pages that may be reserved in total, in multiples of the pool, 1 or more.
    """

    memory_bytes: int = 1 << 30
    page_size: int = 16
    overcommit: float = 1.0

    def num_pages(self, shape: ModelShape) -> int:
        """Pages that fit; raises InvalidSetting if not even one per (layer, KV head) does."""
        page_bytes = self.page_size * (shape.kv_bytes(1) + torch.int32.itemsize)
        num_pages = self.memory_bytes // page_bytes - FIRST_PAGE
        needed = shape.num_layers * shape.num_kv_heads
        if num_pages < needed:
            raise InvalidSetting(
                f"kv_memory_bytes is {self.memory_bytes:,}; this model needs at least "
                f"{(needed + FIRST_PAGE) * page_bytes:,}",
                param="kv_memory_bytes",
            )
        return num_pages


class KVPool:
    """Pages, and the `table` of the rows that own them."""

    def __init__(
        self, shape: ModelShape, config: KVPoolConfig, num_rows: int, device: torch.device
    ) -> None:
        self.shape = shape
        self.page_size = config.page_size
        self.num_pages = config.num_pages(shape)
        self.device = device
        self.table = PageTable(shape, self.page_size, self.num_pages, num_rows)
        size = (self.num_pages + FIRST_PAGE, self.page_size)
        # Not initialized: the memory of a page is first touched when the page is allocated.
        self._pages = torch.empty(2, *size, shape.head_dim, dtype=shape.dtype, device=device)
        self._entries = self._pages.flatten(1, 2)  # [2, num_slots, D]: keys, values
        self._positions = torch.empty(size, dtype=torch.int32, device=device).flatten()
        self._blank(torch.zeros(1, dtype=torch.int64, device=device))

    # How many pages

    def pages_for(self, num_entries: int) -> int:
        """Pages of one sequence whose every (layer, KV head) holds up to `num_entries`."""
        heads = self.shape.num_layers * self.shape.num_kv_heads
        return heads * -(-num_entries // self.page_size)

    def pages_for_queries(self, num_queries: int) -> int:
        """Pages that `place_queries` allocates."""
        return -(-num_queries // (2 * self.page_size))

    @property
    def num_used(self) -> int:
        """Pages that hold entries or queries."""
        return self.num_pages - self.table.num_free

    def lengths(self, rows: list[int]) -> Lengths:
        """Entries per head of the given rows: [len(rows), L, H_kv]."""
        return self.table.lengths(rows)

    def clear(self, row: int) -> None:
        """Free a row's pages."""
        self.table.clear(row)

    def probe(self) -> None:
        """Raise RuntimeError if the device has failed.  Writes to no row's page."""
        self._blank(torch.zeros(1, dtype=torch.int64, device=self.device))
        float(self._entries[0, 0, 0])  # waits for the device, which reports errors only then

    # Whole layers

    def write_layer(self, row: int, layer: LayerKV) -> None:
        """Replace the row's entries of the layer with copies of `layer`'s."""
        placed = self.table.replace_layer(row, layer.layer_idx, layer.head_lengths)
        slots, last_pages = indices_to_device(placed, self.device)
        self._blank(last_pages)
        for entries, own in zip(self._entries, (layer.keys, layer.values), strict=True):
            entries[slots] = tensor_to_device(own, self.device)
        self._positions[slots] = tensor_to_device(layer.positions, self.device)

    def read_layer(self, row: int, layer_idx: int, window_queries: Tensor | None = None) -> LayerKV:
        """A copy of the row's entries of the layer, with the given window queries, or none."""
        if window_queries is None:
            empty = (self.shape.num_heads, 0, self.shape.head_dim)
            window_queries = torch.empty(empty, dtype=self.shape.dtype)
        head_lengths, placed = self.table.layer(row, layer_idx)
        (slots,) = indices_to_device([placed], self.device)
        return LayerKV(
            layer_idx=layer_idx,
            keys=self._entries[0].index_select(0, slots),
            values=self._entries[1].index_select(0, slots),
            positions=self._positions.index_select(0, slots),
            head_lengths=head_lengths,
            window_queries=window_queries,
        )

    def place_queries(self, row: int, num_queries: int) -> Tensor:
        """Allocate pages for `num_queries` queries of the row, in place of its current ones.

        Returns the index of each in `vectors`: [num_queries] int64.
        """
        placed = self.table.replace_queries(row, self.pages_for_queries(num_queries))
        (pages,) = indices_to_device([placed], self.device)
        slots = pages[:, None] * self.page_size + torch.arange(self.page_size, device=self.device)
        return torch.cat([slots, slots + len(self._positions)]).flatten()[:num_queries]

    @property
    def vectors(self) -> Tensor:
        """Keys, values and queries of all pages: [num_vectors, D]."""
        return self._entries.flatten(0, 1)

    # Decode steps

    def plan_step(self, rows: list[int], positions: Tensor) -> StepPlan:
        """Make room for one more entry in every head of the rows; returns where it goes.

        positions: [B], of the new tokens; `lengths` counts them as soon as this returns.
        """
        new = self.table.add_entries(rows)
        by_layer = [array.swapaxes(0, 1) for array in (new.slots, new.pages, new.lengths)]
        *planned, new_pages = indices_to_device([*by_layer, new.new_pages], self.device)
        plan = StepPlan(*planned)
        if len(new_pages):
            self._blank(new_pages)
        self._positions[plan.slots] = positions.to(torch.int32)[:, None]
        return plan

    def append(self, layer_idx: int, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        """Write the step's new entries of a layer.  keys, values: [B, H_kv, D]."""
        self._entries[:, plan.slots[layer_idx]] = torch.stack([keys, values])

    def gather(self, layer_idx: int, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for the step: each [B, H_kv, P * page_size, D]."""
        pages = plan.pages[layer_idx]
        keys, values = self._pages.index_select(1, pages.flatten())
        shape = (*pages.shape[:2], -1, self.shape.head_dim)
        return keys.view(shape), values.view(shape)

    def _blank(self, pages: Tensor) -> None:
        """Zero pages that will be partly filled.

        Attention reads whole pages and masks their ends, but masking does not remove a NaN that a
        failed request left there.
        """
        self._pages.index_fill_(1, pages, 0)
