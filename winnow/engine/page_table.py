"""Who holds which pages, and how many entries: plain host memory, so no call waits for a device.

A page belongs to one (layer, KV head) of one row, or to a row's queries. kv_pool.py keeps what is
in the pages; kv_manager.py decides how many a row may take; this module assumes that enough are
free.

Every method may be called from any thread. A freed page may be taken by another thread at once:
what is enqueued on the device for its old owner runs first, because all threads use one stream.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.kv import ModelShape

FIRST_PAGE = 1  # page 0 pads the tables and is never allocated

Pages = NDArray[np.int32]
Lengths = NDArray[np.int64]
Slots = NDArray[np.int64]  # an entry's slot is its page * page_size + its place in the page


@dataclass(frozen=True, slots=True, eq=False)
class NewEntries:
    """Room for one more entry in each head of B rows.

    slots, lengths: [B, L, H_kv] of the new entries, and of the heads with them.
    pages: [B, L, H_kv, P] of the heads.  new_pages: those of them that were free before.
    """

    slots: Slots
    lengths: Lengths
    pages: Pages
    new_pages: Pages


class PageTable:
    """The pages and lengths of every row, and the free pages."""

    def __init__(self, shape: ModelShape, page_size: int, num_pages: int, num_rows: int) -> None:
        self.page_size = page_size
        heads = (num_rows, shape.num_layers, shape.num_kv_heads)
        self._lengths = np.zeros(heads, dtype=np.int64)
        self._pages = np.zeros((*heads, 1), dtype=np.int32)
        self._query_pages: dict[int, Pages] = {}  # by row
        self._free = np.arange(FIRST_PAGE, FIRST_PAGE + num_pages, dtype=np.int32)  # a stack
        self._num_free = num_pages
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return self._num_free

    def lengths(self, rows: list[int]) -> Lengths:
        """Entries per head of the given rows: [len(rows), L, H_kv]."""
        with self._lock:
            return self._lengths[rows]

    # How many pages

    def pages_held(self, row: int) -> int:
        """Pages that the row holds, those of its queries included."""
        with self._lock:
            return self._pages_for(row, self._lengths[row])

    def pages_within_reach(self, row: int, extra_entries: int, cap: int) -> int:
        """The most pages that the row can hold.

        Each head may grow by `extra_entries`, up to the larger of `cap` and its length plus one.
        """
        with self._lock:
            lengths = self._lengths[row]
            reach = np.minimum(lengths + extra_entries, np.maximum(lengths + 1, cap))
            return self._pages_for(row, reach)

    def pages_after_step(self, rows: list[int]) -> dict[int, int]:
        """Pages that each row holds after `add_entries` to its heads."""
        with self._lock:
            entries = self._pages_of(self._lengths[rows] + 1).sum((1, 2)).tolist()
            return {
                row: own + self._num_query_pages(row)
                for row, own in zip(rows, entries, strict=True)
            }

    # Who holds them

    def layer(self, row: int, layer_idx: int) -> tuple[tuple[int, ...], Slots]:
        """Entries per KV head of the layer, and the slot of each, heads one after another."""
        with self._lock:
            lengths = self._lengths[row, layer_idx].copy()
            pages = self._pages[row, layer_idx, :, : self._pages_of(lengths).max()].copy()
        return tuple(lengths.tolist()), self._slots(pages, lengths)

    def replace_layer(
        self, row: int, layer_idx: int, head_lengths: Sequence[int]
    ) -> tuple[Slots, Pages]:
        """Free the layer's pages, and allocate some for `head_lengths` entries.

        Returns the slots of the entries, heads one after another, and each head's last page.
        """
        lengths = np.array(head_lengths)
        counts = self._pages_of(lengths)
        wanted = np.arange(counts.max()) < counts[:, None]  # [H_kv, P]
        with self._lock:
            self._free_pages(self._pages[row, layer_idx])
            self._widen(wanted.shape[1])
            pages = np.zeros(wanted.shape, dtype=np.int32)
            pages[wanted] = self._take(int(counts.sum()))
            self._pages[row, layer_idx, :, : wanted.shape[1]] = pages
            self._lengths[row, layer_idx] = lengths
        filled = counts.nonzero()[0]
        return self._slots(pages, lengths), pages[filled, counts[filled] - 1]

    def add_entries(self, rows: list[int]) -> NewEntries:
        """Make room for one more entry in every head of the rows."""
        with self._lock:
            lengths = self._lengths[rows]  # [B, L, H_kv]
            page = lengths // self.page_size
            width = int(page.max()) + 1
            self._widen(width)
            batch, layer, head = full = (lengths % self.page_size == 0).nonzero()
            new_pages = self._take(len(batch))
            self._pages[np.array(rows)[batch], layer, head, page[full]] = new_pages
            self._lengths[rows] = lengths + 1
            pages = self._pages[rows, :, :, :width]
        last_page = np.take_along_axis(pages, page[..., None], -1)[..., 0].astype(np.int64)
        slots = last_page * self.page_size + lengths % self.page_size
        return NewEntries(slots, lengths + 1, pages, new_pages)

    def replace_queries(self, row: int, num_pages: int) -> Pages:
        """Allocate pages for the row's queries, in place of its current ones."""
        with self._lock:
            self._free_queries(row)
            self._query_pages[row] = self._take(num_pages)
            return self._query_pages[row]

    def clear(self, row: int) -> None:
        """Free a row's pages."""
        with self._lock:
            self._free_pages(self._pages[row])
            self._free_queries(row)
            self._lengths[row] = 0

    def _slots(self, pages: Pages, lengths: Lengths) -> Slots:
        """pages: [H_kv, P] of the heads; lengths: [H_kv]."""
        place = np.arange(self.page_size)
        slots = pages[..., None].astype(np.int64) * self.page_size + place  # [H_kv, P, page_size]
        slots = slots.reshape(len(lengths), -1)
        return slots[np.arange(slots.shape[1]) < lengths[:, None]]

    def _pages_of(self, lengths: Lengths) -> Lengths:
        return -(-lengths // self.page_size)

    # The lock is held

    def _pages_for(self, row: int, lengths: Lengths) -> int:
        """Pages of the row if its heads had these lengths [L, H_kv]."""
        return int(self._pages_of(lengths).sum()) + self._num_query_pages(row)

    def _num_query_pages(self, row: int) -> int:
        return len(self._query_pages.get(row, ()))

    def _take(self, count: int) -> Pages:
        assert count <= self._num_free, "every page that is taken was promised"
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def _free_pages(self, pages: Pages) -> None:
        """Free a part of the table, and empty it."""
        self._give_back(pages[pages > 0])
        pages[:] = 0

    def _free_queries(self, row: int) -> None:
        self._give_back(self._query_pages.pop(row, np.empty(0, dtype=np.int32)))

    def _give_back(self, pages: Pages) -> None:
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def _widen(self, num_pages: int) -> None:
        """Make the table at least `num_pages` wide."""
        *heads, width = self._pages.shape
        if num_pages > width:
            narrow, self._pages = (
                self._pages,
                np.zeros((*heads, max(num_pages, 2 * width)), np.int32),
            )
            self._pages[..., :width] = narrow
