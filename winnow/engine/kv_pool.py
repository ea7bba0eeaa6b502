"""Paged KV cache of many sequences. A page belongs to one (layer, KV head) of one row.

A row is a sequence's slot in the batch. Pages are per head, so heads of different lengths waste at
most the rest of their last page. A row's last queries, which recompression scores with, are stored
in pages too, so the pool also bounds them. kv_manager.py decides how many pages a row may take;
this module assumes that enough are free.

Every method may be called from any thread. Concurrent writes must be to different rows; so
prefill's KV can arrive while other rows decode.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.attention import StepPlan
from winnow.errors import InvalidSetting
from winnow.kv import LayerKV, ModelShape

_FIRST_PAGE = 1  # page 0 pads the page tables and is never allocated


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
        num_pages = self.memory_bytes // page_bytes - _FIRST_PAGE
        needed = shape.num_layers * shape.num_kv_heads
        if num_pages < needed:
            raise InvalidSetting(
                f"kv_memory_bytes is {self.memory_bytes:,}; this model needs at least "
                f"{(needed + _FIRST_PAGE) * page_bytes:,}",
                param="kv_memory_bytes",
            )
        return num_pages


class KVPool:
    """Pages, and the rows that own them."""

    def __init__(
        self, shape: ModelShape, config: KVPoolConfig, num_rows: int, device: torch.device
    ) -> None:
        self.shape = shape
        self.page_size = config.page_size
        self.num_pages = config.num_pages(shape)
        self.device = device
        size = (self.num_pages + _FIRST_PAGE, self.page_size)
        # Not initialized: the memory of a page is first touched when the page is allocated.
        entries = torch.empty(2, *size, shape.head_dim, dtype=shape.dtype, device=device)
        self._keys, self._values = entries
        self._vectors = entries.view(-1, shape.head_dim)  # keys, then values
        self._query_pages: dict[int, Tensor] = {}  # page ids by row
        self._positions = torch.empty(size, dtype=torch.int32, device=device)
        self._blank(torch.zeros(1, dtype=torch.int64, device=device))
        heads = (num_rows, shape.num_layers, shape.num_kv_heads)
        self._lengths = torch.zeros(heads, dtype=torch.int64, device=device)
        self._table = torch.zeros(*heads, 1, dtype=torch.int64, device=device)
        self._free_pages = torch.arange(_FIRST_PAGE, size[0], device=device)  # a stack
        self._num_free = self.num_pages
        self._lock = threading.RLock()

    # How many pages

    def pages_for(self, num_entries: int) -> int:
        """Pages of one sequence whose every (layer, KV head) holds up to `num_entries`."""
        heads = self.shape.num_layers * self.shape.num_kv_heads
        return heads * -(-num_entries // self.page_size)

    def pages_for_queries(self, num_queries: int) -> int:
        """Pages that `place_queries` allocates."""
        return -(-num_queries // (2 * self.page_size))

    def pages_held(self, row: int) -> int:
        """Pages that the row holds, those of its queries included."""
        with self._lock:
            return self._num_pages_of(row, self._lengths[row])

    def pages_within_reach(self, row: int, extra_entries: int, cap: int) -> int:
        """The most pages that the row can hold.

        Each head may grow by `extra_entries`, up to the larger of `cap` and its length plus one.
        """
        with self._lock:
            lengths = self._lengths[row]
            reach = (lengths + extra_entries).minimum((lengths + 1).clamp_min(cap))
            return self._num_pages_of(row, reach)

    def pages_after_step(self, rows: list[int]) -> dict[int, int]:
        """Pages that each row holds after `plan_step` has made room for one more entry per head."""
        with self._lock:
            entries = (self._lengths[rows] // self.page_size + 1).flatten(1).sum(1).tolist()
            return {
                row: own + self._num_query_pages(row)
                for row, own in zip(rows, entries, strict=True)
            }

    @property
    def num_used(self) -> int:
        """Pages that hold entries or queries."""
        return self.num_pages - self._num_free

    def clear(self, row: int) -> None:
        """Free a row's pages."""
        with self._lock:
            for layer_idx in range(self.shape.num_layers):
                self._truncate(row, layer_idx, torch.zeros_like(self._lengths[row, layer_idx]))
            self._drop_queries(row)

    def probe(self) -> None:
        """Raise RuntimeError if the device has failed.  Writes to no row's page."""
        self._blank(torch.zeros(1, dtype=torch.int64, device=self.device))
        float(self._keys[0, 0, 0])  # synchronizes with the device, which reports errors only then

    # Whole layers

    def write_layer(self, row: int, layer: LayerKV) -> None:
        """Replace the row's entries of the layer with copies of `layer`'s."""
        lengths = torch.tensor(layer.head_lengths, device=self.device)
        with self._lock:
            self._truncate(row, layer.layer_idx, torch.zeros_like(lengths))
            self._grow(row, layer.layer_idx, lengths)
            slots = self._entry_slots(row, layer.layer_idx)
        self._keys.view(-1, self.shape.head_dim)[slots] = layer.keys.to(self.device)
        self._values.view(-1, self.shape.head_dim)[slots] = layer.values.to(self.device)
        self._positions.view(-1)[slots] = layer.positions.to(self.device)

    def read_layer(self, row: int, layer_idx: int, window_queries: Tensor | None = None) -> LayerKV:
        """A copy of the row's entries of the layer, with the given window queries, or none."""
        if window_queries is None:
            empty = (self.shape.num_heads, 0, self.shape.head_dim)
            window_queries = torch.empty(empty, dtype=self.shape.dtype)
        with self._lock:
            slots = self._entry_slots(row, layer_idx)
            lengths = tuple(self._lengths[row, layer_idx].tolist())
        return LayerKV(
            layer_idx=layer_idx,
            keys=self._keys.view(-1, self.shape.head_dim)[slots],
            values=self._values.view(-1, self.shape.head_dim)[slots],
            positions=self._positions.view(-1)[slots],
            head_lengths=lengths,
            window_queries=window_queries,
        )

    def place_queries(self, row: int, num_queries: int) -> Tensor:
        """Allocate pages for `num_queries` queries of the row, in place of its current ones.

        Returns the index of each in `vectors`: [num_queries] int64.
        """
        with self._lock:
            self._drop_queries(row)
            pages = self._take_pages(self.pages_for_queries(num_queries))
            self._query_pages[row] = pages
        slots = pages[:, None] * self.page_size + torch.arange(self.page_size, device=self.device)
        values = slots + len(self._vectors) // 2
        return torch.cat([slots, values]).flatten()[:num_queries]

    @property
    def vectors(self) -> Tensor:
        """Keys, values and queries of all pages: [num_vectors, D]."""
        return self._vectors

    def lengths(self, rows: list[int]) -> Tensor:
        """Entries per head of the given rows: [len(rows), L, H_kv] int64."""
        with self._lock:
            return self._lengths[rows]

    # Decode steps

    def plan_step(self, rows: list[int], positions: Tensor) -> StepPlan:
        """Make room for one more entry in every head of the rows; returns where it goes.

        positions: [B], of the new tokens; `lengths` counts them as soon as this returns.
        """
        with self._lock:
            lengths = self._lengths[rows]  # [B, L, H]
            self._add_pages(rows, lengths)
            width = int(lengths.max()) // self.page_size + 1
            pages = self._table[rows][..., :width]  # [B, L, H, P]
            last_page = pages.gather(-1, (lengths // self.page_size)[..., None])[..., 0]
            slots = last_page * self.page_size + lengths % self.page_size
            self._positions.view(-1)[slots] = positions.to(torch.int32)[:, None, None]
            self._lengths[rows] = lengths + 1
        return StepPlan(
            slots=slots.transpose(0, 1).contiguous(),
            pages=pages.transpose(0, 1).contiguous(),
            lengths=(lengths + 1).transpose(0, 1).contiguous(),
        )

    def append(self, layer_idx: int, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        """Write the step's new entries of a layer.  keys, values: [B, H_kv, D]."""
        slots = plan.slots[layer_idx]
        self._keys.view(-1, self.shape.head_dim)[slots] = keys
        self._values.view(-1, self.shape.head_dim)[slots] = values

    def gather(self, layer_idx: int, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for the step: each [B, H_kv, P * page_size, D]."""
        pages = plan.pages[layer_idx]
        shape = (*pages.shape[:2], -1, self.shape.head_dim)
        flat = pages.flatten()
        return self._keys[flat].view(shape), self._values[flat].view(shape)

    # Pages of one row; the lock is held

    def _num_pages_of(self, row: int, lengths: Tensor) -> int:
        """Pages of the row if its heads had these lengths [L, H_kv]."""
        return int((-(-lengths // self.page_size)).sum()) + self._num_query_pages(row)

    def _num_query_pages(self, row: int) -> int:
        return len(self._query_pages.get(row, ()))

    def _drop_queries(self, row: int) -> None:
        if row in self._query_pages:
            freed = self._query_pages[row]
            self._free_pages[self._num_free : self._num_free + len(freed)] = freed
            self._num_free += len(freed)
            del self._query_pages[row]

    # Pages of one layer of one row; the lock is held

    def _entry_slots(self, row: int, layer_idx: int) -> Tensor:
        """The slot of every entry of the layer, heads one after another: [num_entries]."""
        lengths = self._lengths[row, layer_idx]
        slots = self._table[row, layer_idx][..., None] * self.page_size
        slots = (slots + torch.arange(self.page_size, device=self.device)).flatten(1)  # [H, T]
        entry = torch.arange(slots.shape[1], device=self.device)
        return slots[entry < lengths[:, None]]

    def _truncate(self, row: int, layer_idx: int, lengths: Tensor) -> None:
        """Shorten the layer's heads to `lengths` [H_kv] and free the pages behind them."""
        table = self._table[row, layer_idx]
        page = torch.arange(table.shape[1], device=self.device)
        behind = (page >= -(-lengths // self.page_size)[:, None]) & (table > 0)
        freed = table[behind]
        self._free_pages[self._num_free : self._num_free + len(freed)] = freed
        table.masked_fill_(behind, 0)  # before _num_free grows: a failure cannot free them twice
        self._num_free += len(freed)
        self._lengths[row, layer_idx] = lengths

    def _grow(self, row: int, layer_idx: int, lengths: Tensor) -> None:
        """Allocate pages for `lengths` [H_kv] entries to an empty layer."""
        num_pages = -(-lengths // self.page_size)
        self._widen(int(num_pages.max()))
        page = torch.arange(self._table.shape[-1], device=self.device)
        wanted = page < num_pages[:, None]
        table = self._table[row, layer_idx]
        table[wanted] = self._take_pages(int(num_pages.sum()))
        self._blank(table.gather(1, (num_pages - 1).clamp_min(0)[:, None])[num_pages > 0])
        self._lengths[row, layer_idx] = lengths

    def _add_pages(self, rows: list[int], lengths: Tensor) -> None:
        """Allocate a page to each head whose last one is full.  lengths: [B, L, H_kv]."""
        full = lengths % self.page_size == 0
        num_new = int(full.sum())
        if not num_new:
            return
        self._widen(int(lengths.max()) // self.page_size + 1)
        batch, layer, head = full.nonzero(as_tuple=True)
        row = torch.tensor(rows, device=self.device)[batch]
        page = lengths[full] // self.page_size
        new = self._take_pages(num_new)
        self._blank(new)
        self._table[row, layer, head, page] = new

    def _blank(self, pages: Tensor) -> None:
        """Zero pages that will be partly filled.

        Attention reads whole pages and masks their ends, but masking does not remove a NaN that a
        failed request left there.
        """
        self._keys[pages] = 0
        self._values[pages] = 0

    def _take_pages(self, count: int) -> Tensor:
        assert count <= self._num_free, "every page that is taken was promised"
        self._num_free -= count
        return self._free_pages[self._num_free : self._num_free + count].clone()

    def _widen(self, num_pages: int) -> None:
        width = self._table.shape[-1]
        if num_pages > width:
            extra = max(num_pages, 2 * width) - width
            self._table = torch.nn.functional.pad(self._table, (0, extra))
