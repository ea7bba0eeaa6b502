"""Paged KV cache of many sequences: page_storage.py has the pages, page_table.py whose they are.

A row is a sequence's slot in the batch. Pages are per head, so heads of different lengths waste at
most the rest of their last page. A row's last queries, which recompression scores with, are stored
in pages too, so the pool also bounds them. The table counts the layers that have keys and values,
and no others; states of recurrent layers lie beside the pages (state_storage.py).

Every method may be called from any thread; none waits for the device, except `probe`. Concurrent
writes must be to different rows; so prefill's KV can arrive while other rows decode.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from winnow.attention import PagedEntries, StepPlan
from winnow.engine.page_storage import STORAGES
from winnow.engine.page_table import FIRST_PAGE, Lengths, PageTable, Slots
from winnow.engine.state_storage import StateStorage
from winnow.engine.table_mirror import TableMirror
from winnow.engine.windows import Windows
from winnow.errors import InvalidSetting
from winnow.kv import KvDtype, LayerKV, ModelShape, without_entries
from winnow.to_device import indices_to_device


@dataclass(frozen=True, slots=True)
class KVPoolConfig:
    """memory_bytes: for keys, values and positions of all pages, and for the rows' states.

    page_size: entries per page.

    overcommit: pages that may be reserved in total, in multiples of the pool, 1 or more.
    kv_dtype: how keys and values are held.
    num_ranks: processes that have as many heads each, and as many pages of the memory.
    """

    memory_bytes: int = 1 << 30
    page_size: int = 16
    overcommit: float = 1.0
    kv_dtype: KvDtype = "auto"
    num_ranks: int = 1

    def num_pages(self, shape: ModelShape, num_rows: int = 0) -> int:
        """Pages of each rank; raises InvalidSetting if not one per (layer, KV head) fits.

        shape: with the heads of one rank.  num_rows: rows whose states are held.
        """
        entry_bytes = shape.kv_bytes(1, self.kv_dtype) + torch.int32.itemsize
        page_bytes = self.num_ranks * self.page_size * entry_bytes
        state_bytes = num_rows * shape.state_bytes
        num_pages = (self.memory_bytes - state_bytes) // page_bytes - FIRST_PAGE
        needed = shape.total_kv_heads
        if num_pages < needed:
            states = f", {state_bytes:,} of it for the states of {num_rows} sequences"
            raise InvalidSetting(
                f"kv_memory_bytes is {self.memory_bytes:,}; this model needs at least "
                f"{(needed + FIRST_PAGE) * page_bytes + state_bytes:,}"
                + (states if state_bytes else ""),
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
        self.kv_dtype = config.kv_dtype
        self.num_ranks = config.num_ranks
        self.num_pages = config.num_pages(shape, num_rows + 1)
        self.device = device
        with_kv = shape.of_kv_layers()
        self._kv_idx = {layer_idx: idx for idx, layer_idx in enumerate(shape.kv_layers)}
        self.table = PageTable(with_kv, self.page_size, self.num_pages, num_rows)
        self.mirror = TableMirror(with_kv, self.page_size, num_rows, device)
        self.states = StateStorage(shape, num_rows, device)
        num_pages = self.num_pages + FIRST_PAGE
        self.storage = STORAGES[self.kv_dtype](shape, num_pages, self.page_size, device)
        self.storage.blank(torch.zeros(1, dtype=torch.int64, device=device))

    def kv_idx(self, layer_idx: int) -> int | None:
        """A layer's index among those with keys and values; None if it has none."""
        return self._kv_idx.get(layer_idx)

    # How many pages

    def pages_for(self, num_entries: int, in_windows: int | None = None) -> int:
        """Pages of one sequence whose every (layer, KV head) holds up to `num_entries`.

        in_windows: entries that heads of windowed layers have come to, of which they hold no more
        than their windows; None: as many.
        """
        heads = (len(self._kv_idx), self.shape.num_kv_heads)
        lengths = np.full(heads, num_entries, dtype=np.int64)
        if in_windows is not None:
            lengths[self.windows.layers] = in_windows
        return self._pages_of(lengths)

    def pages_to_go_on(self, layers: list[LayerKV]) -> int:
        """Pages of a sequence with these layers, once it has one more entry per head."""
        with_kv = (layer for layer in layers if self.kv_idx(layer.layer_idx) is not None)
        lengths = [self.windows.of_every_head(layer.head_lengths) for layer in with_kv]
        return self._pages_of(np.array(lengths) + 1)

    def _pages_of(self, lengths: Lengths) -> int:
        """Pages that heads need at most which have grown to `lengths` [L, H_kv]."""
        return int((-(-self.windows.held(lengths) // self.page_size)).sum())

    @property
    def windows(self) -> Windows:
        """Of the layers with keys and values, which it counts."""
        return self.table.windows

    def pages_for_queries(self, num_queries: int) -> int:
        """Pages that `place_queries` allocates."""
        return -(-num_queries // self.storage.vectors_per_page)

    def kv_bytes(self, num_entries: int) -> int:
        """Bytes that keys and values of `num_entries` entries of one KV head take in pages."""
        return self.shape.kv_bytes(num_entries, self.kv_dtype)

    @property
    def num_used(self) -> int:
        """Pages that hold entries or queries."""
        return self.num_pages - self.table.num_free

    def lengths(self, rows: list[int]) -> Lengths:
        """Entries per head of the given rows: [len(rows), L, H_kv], of the layers with KV."""
        return self.table.lengths(rows)

    def clear(self, row: int) -> None:
        """Free a row's pages."""
        self.table.clear(row)

    def probe(self) -> None:
        """Raise RuntimeError if the device has failed.  Writes to no row's page."""
        self.storage.blank(torch.zeros(1, dtype=torch.int64, device=self.device))
        float(self.storage.vectors[0, 0])  # waits for the device, which reports errors only then

    # Whole layers

    def write_layer(self, row: int, layer: LayerKV) -> None:
        """Replace the row's entries and state of the layer with copies of `layer`'s."""
        self.states.write(row, layer)
        kv_idx = self.kv_idx(layer.layer_idx)
        if kv_idx is None:
            return
        placed = self.table.replace_layer(row, kv_idx, layer.head_lengths)
        slots, last_pages = indices_to_device(placed, self.device)
        self.storage.blank(last_pages)
        self.storage.write(slots, layer.padded(self.shape.head_dim))

    def read_layer(self, row: int, layer_idx: int, window_queries: Tensor | None = None) -> LayerKV:
        """A copy of the row's entries and state of the layer.  window_queries: to go with them."""
        states = self.states.read(row, layer_idx)
        kv_idx = self.kv_idx(layer_idx)
        if kv_idx is None:
            return replace(without_entries(self.shape, layer_idx, self.device), states=states)
        size = self.shape.sizes[layer_idx]
        if window_queries is None:
            empty = (self.shape.num_heads, 0, size.key_dim)
            window_queries = torch.empty(empty, dtype=self.shape.dtype)
        head_lengths, placed = self.table.layer(row, kv_idx)
        (slots,) = indices_to_device([placed], self.device)
        layer = self.storage.read(slots, layer_idx, head_lengths, window_queries)
        return replace(layer.cut(size), states=states)

    def import_layer(self, row: int, layer: LayerKV) -> LayerKV:
        """`write_layer` of all the model's heads; returns this pool's heads of it."""
        self.write_layer(row, layer)
        return layer

    def export_layer(
        self, row: int, layer_idx: int, window_queries: Tensor | None = None
    ) -> LayerKV:
        """`read_layer` of all the model's heads.  window_queries: of this pool's heads."""
        return self.read_layer(row, layer_idx, window_queries)

    def place_queries(self, row: int, num_queries: int) -> Slots:
        """Allocate pages for `num_queries` queries of the row, in place of its current ones.

        Returns the index of each in `vectors`: [num_queries].
        """
        pages = self.table.replace_queries(row, self.pages_for_queries(num_queries))
        per_half, in_values = self.storage.vectors_per_page // 2, len(self.vectors) // 2
        slots = pages[:, None].astype(np.int64) * per_half + np.arange(per_half)
        return np.concatenate([slots, slots + in_values], axis=None)[:num_queries]

    @property
    def vectors(self) -> Tensor:
        """The memory of queries: [num_vectors, D]."""
        return self.storage.vectors

    @property
    def paged(self) -> PagedEntries:
        """All pages' keys and values."""
        return self.storage.paged

    @property
    def in_pages(self) -> tuple[Tensor, ...]:
        """What entries consist of, as in `PageStorage.parts`: each [num_pages, page_size, ...]."""
        return tuple(part.view(-1, self.page_size, *part.shape[1:]) for part in self.storage.parts)

    # Decode steps

    def begin_step(
        self, rows: list[int], positions: list[int], along: ArrayLike
    ) -> tuple[Tensor, list[int]]:
        """Make room for one more entry in every head of the rows, and let the device know of it.

        positions: [B], of the new tokens.
        `lengths` counts the entries as soon as this returns; `plan_step` places them.
        Returns the integers `along` on the device, sent in the same copy as int64, and the entries
        of each row's longest head.
        """
        changes = self.table.add_entries(rows, positions)
        missing = self.mirror.missing(changes)
        sent, *missing_there = indices_to_device([along, *missing], self.device)
        if missing:
            self.mirror.update(*missing_there)
        if changes.num_new:
            self.storage.blank(missing_there[0][: changes.num_new])
        return sent, changes.longest.tolist()

    def plan_step(
        self, rows: Tensor, positions: Tensor, longest: list[int] | None = None
    ) -> StepPlan:
        """Where the entries of a begun step go, told by the device alone.

        rows: [B], as in `begin_step`, and any number of `mirror.dummy_row`.  positions: [B], of the
        new tokens.  longest: see StepPlan.
        """
        plan = self.mirror.add_entries(rows, positions, longest)
        self.storage.positions[plan.slots] = positions.int()[:, None]
        return plan

    def append(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write new entries of a layer.  slots: [B, H_kv].  keys, values: [B, H_kv, D]."""
        self.storage.append(slots, keys, values)

    def gather(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pages [B, H_kv, P]: each [B, H_kv, P * page_size, D]."""
        return self.storage.gather(pages)
