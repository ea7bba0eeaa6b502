"""Paged memory for the KV of many sequences. A page belongs to one (layer, KV head) of one row.

Because pages are per head, heads of different lengths cost nothing but the rest of their last page.
A row's last queries, by which it is cut, lie in pages too, so that the pool bounds them as well.
A row is a sequence's place in the batch. Rows and pages are promised together (`reserve`). The
pages for what a row holds, or is about to receive, are always there. Those that it may still grow
into are too, unless promises exceed the pool by `overcommit`; so whoever runs the rows claims what
a step takes before it, and makes some of them give way where that fails.

Every method may be called from any thread; pages of different rows are never written by the same
call, so prefill's KV arrives while other rows decode.
"""

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.promises import Promise, Promises
from winnow.errors import InvalidSetting
from winnow.kv import LayerKV, ModelShape

_NOTHING = Promise(0, 0)
_FIRST_PAGE = 1  # page 0 fills the unused ends of page tables and is never promised


@dataclass(frozen=True, slots=True)
class KVPoolConfig:
    """memory_bytes: for keys, values and positions of all pages; page_size: entries per page.

    overcommit: what may be promised in all, in pools, 1 or more.
    """

    memory_bytes: int = 1 << 30
    page_size: int = 32
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


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Pages in all, used, and promised (the used ones included); bytes of used pages.

    pages_used: that hold entries or queries.  pages_free: that a request could be promised now.
    """

    pages_total: int
    pages_used: int
    pages_reserved: int
    pages_free: int
    page_size: int
    kv_bytes_used: int

    @property
    def used_ratio(self) -> float:
        """Pages holding entries, of all."""
        return self.pages_used / self.pages_total


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Where one decode step writes and reads, for a batch of B rows.

    slots: [L, B, H_kv] entry that each head's new token goes to.
    pages: [L, B, H_kv, P] pages of each head, the new token's included.
    visible: [L, B, H_kv, P * page_size] bool, False behind a head's last entry.
    """

    slots: Tensor
    pages: Tensor
    visible: Tensor


class KVPool:
    """Pages, the rows that own them, and the promises made."""

    def __init__(
        self, shape: ModelShape, config: KVPoolConfig, num_rows: int, device: torch.device
    ) -> None:
        self.shape = shape
        self.page_size = config.page_size
        self.num_pages = config.num_pages(shape)
        self.device = device
        size = (self.num_pages + _FIRST_PAGE, self.page_size)
        # Not filled: memory that no page was taken from is never touched.
        entries = torch.empty(2, *size, shape.head_dim, dtype=shape.dtype, device=device)
        self._keys, self._values = entries
        self._vectors = entries.view(-1, shape.head_dim)  # of both
        self._query_pages: dict[int, Tensor] = {}  # by row
        self._positions = torch.empty(size, dtype=torch.int32, device=device)
        self._blank(torch.zeros(1, dtype=torch.int64, device=device))
        heads = (num_rows, shape.num_layers, shape.num_kv_heads)
        self._lengths = torch.zeros(heads, dtype=torch.int64, device=device)
        self._table = torch.zeros(*heads, 1, dtype=torch.int64, device=device)
        self._free_pages = torch.arange(_FIRST_PAGE, size[0], device=device)  # a stack
        self._num_free = self.num_pages
        self._promises = Promises(self.num_pages, num_rows, config.overcommit)
        self._lock = threading.RLock()

    # Promises

    def pages_for(self, num_entries: int) -> int:
        """Pages of one sequence whose every (layer, KV head) holds up to `num_entries`."""
        heads = self.shape.num_layers * self.shape.num_kv_heads
        return heads * -(-num_entries // self.page_size)

    def pages_for_queries(self, num_queries: int) -> int:
        """Pages that `place_queries` takes."""
        return -(-num_queries // (2 * self.page_size))

    def reserve(self, num_rows: int, promise: Promise) -> list[int]:
        """Rows with that promise to each.

        Raises InvalidSetting if the pool could never hold them, Overloaded if it cannot now.
        """
        with self._lock:
            return self._promises.give(num_rows, promise)

    def has_room(self, num_rows: int, promise: Promise, freed: Promise = _NOTHING) -> bool:
        """Whether `reserve` would succeed, once `freed` were free besides."""
        with self._lock:
            return self._promises.has_room(num_rows, promise, freed)

    def promised(self, row: int) -> Promise:
        with self._lock:
            return self._promises.of(row)

    def settle(self, row: int, extra_entries: int, cap: int, *, assured: bool = False) -> None:
        """Lower a row's promise to what it holds and what its heads can still grow to.

        Each head may grow by `extra_entries`, but stays within the larger of `cap` and its length
        plus one.  assured: that is kept for it, too; other rows can give way from then on.
        """
        with self._lock:
            lengths = self._lengths[row]
            reach = (lengths + extra_entries).minimum((lengths + 1).clamp_min(cap))
            most, held = (int((-(-n // self.page_size)).sum()) for n in (reach, lengths))
            most, held = most + self._num_query_pages(row), held + self._num_query_pages(row)
            self._promises.change(row, Promise(most, most if assured else held))
            if not assured:
                self._promises.loosen(row)

    def claim(self, rows: list[int]) -> bool:
        """Keeps the pages that `plan_step` of these rows takes; False if there are too few."""
        with self._lock:
            entries = (self._lengths[rows] // self.page_size + 1).flatten(1).sum(1).tolist()
            needed = {
                row: own + self._num_query_pages(row)
                for row, own in zip(rows, entries, strict=True)
            }
            return self._promises.secure(needed)

    def evict(self, row: int) -> None:
        """Frees a row's pages and keeps none for it; `readmit` it before it is written again."""
        with self._lock:
            self.clear(row)
            self._promises.unsecure(row)

    def readmit(self, row: int, num_pages: int, *, spare: int) -> bool:
        """Keeps pages for an evicted row if, after that, `spare` others are free."""
        with self._lock:
            return self._promises.secure({row: num_pages}, spare=spare)

    def release(self, *rows: int) -> None:
        """Frees rows, their pages and their promises.

        Promises are taken back from all even if the device fails at that; pages that a row keeps
        then are freed when it is written next.
        """
        with self._lock, contextlib.ExitStack() as steps:  # the last one first
            for row in rows:
                steps.callback(self._promises.take_back, row)
                steps.callback(self.clear, row)

    def clear(self, row: int) -> None:
        """Frees a row's pages; the promise stays."""
        with self._lock:
            for layer_idx in range(self.shape.num_layers):
                self._truncate(row, layer_idx, torch.zeros_like(self._lengths[row, layer_idx]))
            self._drop_queries(row)

    def probe(self) -> None:
        """Raises RuntimeError if the device computes no more.  Writes to no row's page."""
        self._blank(torch.zeros(1, dtype=torch.int64, device=self.device))
        float(self._keys[0, 0, 0])  # waits for the device, which tells only then

    def stats(self) -> PoolStats:
        with self._lock:
            used = self.num_pages - self._num_free
            free = self._promises.free()
            page_bytes = self.page_size * self.shape.kv_bytes(1)
            return PoolStats(
                pages_total=self.num_pages,
                pages_used=used,
                pages_reserved=self._promises.most_in_all(),
                pages_free=max(0, min(free.most, free.sure)),
                page_size=self.page_size,
                kv_bytes_used=used * page_bytes,
            )

    # Whole layers

    def write_layer(self, row: int, layer: LayerKV) -> None:
        """Replaces what the row holds of the layer by copies of the layer's entries."""
        lengths = torch.tensor(layer.head_lengths, device=self.device)
        with self._lock:
            self._truncate(row, layer.layer_idx, torch.zeros_like(lengths))
            self._grow(row, layer.layer_idx, lengths)
            slots = self._entry_slots(row, layer.layer_idx)
        self._keys.view(-1, self.shape.head_dim)[slots] = layer.keys.to(self.device)
        self._values.view(-1, self.shape.head_dim)[slots] = layer.values.to(self.device)
        self._positions.view(-1)[slots] = layer.positions.to(self.device)

    def read_layer(self, row: int, layer_idx: int, window_queries: Tensor | None = None) -> LayerKV:
        """What the row holds of the layer, copied out, with the given window queries, or none."""
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
        """Takes pages for so many of the row's queries, instead of those it has for some.

        Returns where each goes in `vectors`: [num_queries] int64.
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
        """Makes room for one more entry in every head of the rows and says where it goes.

        positions: [B], of the new tokens; they count as written when this returns.
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
        entry = torch.arange(width * self.page_size, device=self.device)
        visible = entry <= lengths[..., None]
        return StepPlan(
            slots=slots.transpose(0, 1).contiguous(),
            pages=pages.transpose(0, 1).contiguous(),
            visible=visible.transpose(0, 1).contiguous(),
        )

    def append(self, layer_idx: int, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        """Writes the step's new entries of a layer.  keys, values: [B, H_kv, D]."""
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
        """Shortens the layer's heads to `lengths` [H_kv] and frees the pages behind them."""
        table = self._table[row, layer_idx]
        page = torch.arange(table.shape[1], device=self.device)
        behind = (page >= -(-lengths // self.page_size)[:, None]) & (table > 0)
        freed = table[behind]
        self._free_pages[self._num_free : self._num_free + len(freed)] = freed
        table.masked_fill_(behind, 0)  # before they count as free, lest a failure free them twice
        self._num_free += len(freed)
        self._lengths[row, layer_idx] = lengths

    def _grow(self, row: int, layer_idx: int, lengths: Tensor) -> None:
        """Gives an empty layer the pages for `lengths` [H_kv] entries."""
        num_pages = -(-lengths // self.page_size)
        self._widen(int(num_pages.max()))
        page = torch.arange(self._table.shape[-1], device=self.device)
        wanted = page < num_pages[:, None]
        table = self._table[row, layer_idx]
        table[wanted] = self._take_pages(int(num_pages.sum()))
        self._blank(table.gather(1, (num_pages - 1).clamp_min(0)[:, None])[num_pages > 0])
        self._lengths[row, layer_idx] = lengths

    def _add_pages(self, rows: list[int], lengths: Tensor) -> None:
        """A new page for each head whose last one is full.  lengths: [B, L, H_kv]."""
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
        """Zeroes pages that will be partly filled.

        Attention reads whole pages and masks their ends, and a mask does not hide a NaN that a
        broken request left there.
        """
        self._keys[pages] = 0
        self._values[pages] = 0

    def _take_pages(self, count: int) -> Tensor:
        assert count <= self._num_free, "promises cover every page that is taken"
        self._num_free -= count
        return self._free_pages[self._num_free : self._num_free + count].clone()

    def _widen(self, num_pages: int) -> None:
        width = self._table.shape[-1]
        if num_pages > width:
            extra = max(num_pages, 2 * width) - width
            self._table = torch.nn.functional.pad(self._table, (0, extra))
