"""Who holds which pages, and how many entries: plain host memory, so no call waits for a device.

A page belongs to one (layer, KV head) of one row, or to a row's queries. kv_pool.py keeps what is
in the pages; kv_manager.py decides how many a row may take; this module assumes that enough are
free.

Pages whose entries have left their layer's window are freed by the step after (windows.py).

Every method may be called from any thread. A freed page may be taken by another thread at once:
what is enqueued on the device for its old owner runs first, because all threads use one stream.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.engine.windows import Windows
from winnow.kv import ModelShape

FIRST_PAGE = 1  # page 0 pads the tables and is never allocated

Pages = NDArray[np.int32]
Lengths = NDArray[np.int64]
Indices = NDArray[np.int64]
Slots = NDArray[np.int64]  # an entry's slot is its page * page_size + its place in the page


@dataclass(frozen=True, slots=True, eq=False)
class TableChanges:
    """What `add_entries` did to B rows, and whatever else a copy of these rows lacks.

    longest: [B] entries of each row's longest head, the new one included.
    num_new: of the pages that were free before; they come first in `pages`.
    pages: [n], and their places in the table, four indices each: `page_at`, (layer, row, head,
    column).
    lengths: [m, H_kv] entries of a layer's heads without the new ones, and where: `length_at`,
    (layer, row).  Left out of lengths: those that only `add_entries` has changed.
    lost: [k, H_kv], how many of its first pages each head of a layer has lost before that, and
    where: `lost_at`, (layer, row).
    width: columns that the rows' longest head takes.
    """

    longest: Lengths
    num_new: int
    pages: Pages
    page_at: tuple[Indices, ...]
    lengths: Lengths
    length_at: tuple[Indices, ...]
    lost: Lengths
    lost_at: tuple[Indices, ...]
    width: int


class PageTable:
    """The pages and lengths of every row, and the free pages."""

    def __init__(self, shape: ModelShape, page_size: int, num_pages: int, num_rows: int) -> None:
        self.page_size = page_size
        self.windows = Windows(shape, page_size)
        heads = (num_rows, shape.num_layers, shape.num_kv_heads)
        self._lengths = np.zeros(heads, dtype=np.int64)
        self._pages = np.zeros((*heads, 1), dtype=np.int32)
        # What of each row's layers has changed other than by `add_entries`.
        self._has_other_pages = np.zeros(heads[:2], dtype=bool)
        self._has_other_lengths = np.zeros(heads[:2], dtype=bool)
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

        Each head may grow by `extra_entries`; one of a full layer up to the larger of `cap` and its
        length plus one, one of another up to its window.
        """
        with self._lock:
            lengths = self._lengths[row]
            reach = lengths + extra_entries
            full = self.windows.full
            reach[full] = np.minimum(reach[full], np.maximum(lengths[full] + 1, cap))
            return self._pages_for(row, np.maximum(self.windows.held(reach), lengths))

    def pages_after_step(self, rows: list[int]) -> dict[int, int]:
        """Pages that each row holds after `add_entries` to its heads."""
        with self._lock:
            lengths = self.windows.held(self._lengths[rows] + 1)
            entries = self._pages_of(lengths).sum((1, 2)).tolist()
            return {
                row: own + self._num_query_pages(row)
                for row, own in zip(rows, entries, strict=True)
            }

    def width_after_step(self, rows: list[int]) -> int:
        """Pages of the rows' longest head after `add_entries`, at most."""
        with self._lock:
            return int(self._lengths[rows].max()) // self.page_size + 1

    # Who holds them

    def layer(self, row: int, layer_idx: int) -> tuple[tuple[int, ...], Slots]:
        """Entries per KV head of the layer, and the slot of each, heads one after another."""
        num_heads = self.windows.has_head[layer_idx].sum()
        with self._lock:
            lengths = self._lengths[row, layer_idx, :num_heads].copy()
            width = self._pages_of(lengths).max()
            pages = self._pages[row, layer_idx, :num_heads, :width].copy()
        return tuple(lengths.tolist()), self._slots(pages, lengths)

    def replace_layer(
        self, row: int, layer_idx: int, head_lengths: Sequence[int]
    ) -> tuple[Slots, Pages]:
        """Free the layer's pages, and allocate some for `head_lengths` entries.

        A windowed layer's heads have no more than what `windows` says that they hold.
        Returns the slots of the entries, heads one after another, and each head's last page.
        """
        lengths = self.windows.of_every_head(head_lengths)
        assert (lengths <= self.windows.most[layer_idx]).all(), "a window bounds what arrives"
        counts = self._pages_of(lengths)
        wanted = np.arange(counts.max()) < counts[:, None]  # [H_kv, P]
        with self._lock:
            self._free_pages(self._pages[row, layer_idx])
            self._widen(wanted.shape[1])
            pages = np.zeros(wanted.shape, dtype=np.int32)
            pages[wanted] = self._take(int(counts.sum()))
            self._pages[row, layer_idx, :, : wanted.shape[1]] = pages
            self._lengths[row, layer_idx] = lengths
            self._has_other_pages[row, layer_idx] = self._has_other_lengths[row, layer_idx] = True
        filled = counts.nonzero()[0]
        return self._slots(pages, lengths), pages[filled, counts[filled] - 1]

    def add_entries(self, rows: list[int], positions: Sequence[int]) -> TableChanges:
        """Make room for one more entry in every head of the rows, at these positions [B].

        First, pages that these tokens' windows have left are freed.
        """
        row = np.array(rows)
        with self._lock:
            lost, lost_at = self._leave_windows(row, positions)
            lengths = self._lengths[row]  # [B, L, H_kv]
            column = lengths // self.page_size  # of the new entry
            width = int(column.max()) + 1
            self._widen(width)
            needs_page = (lengths % self.page_size == 0) & self.windows.has_head
            batch, layer, head = full = needs_page.nonzero()
            pages = self._take(len(batch))
            page_at: tuple[Indices, ...] = (layer, row[batch], head, column[full])
            self._pages[page_at[1], layer, head, page_at[3]] = pages
            self._lengths[row] = lengths + self.windows.has_head
            batch, layer = rewritten = self._has_other_pages[row].nonzero()
            if len(batch):
                own_at = _filled(layer, row[batch], column[rewritten])
                own = self._pages[own_at[1], own_at[0], own_at[2], own_at[3]]
                pages = np.concatenate([pages, own])
                page_at = tuple(map(np.concatenate, zip(page_at, own_at, strict=True)))
            batch, layer = changed = self._has_other_lengths[row].nonzero()
            self._has_other_pages[row] = self._has_other_lengths[row] = False
        longest = lengths.max((1, 2)) + 1
        length_at = layer, row[batch]
        return TableChanges(
            longest=longest,
            num_new=len(full[0]),
            pages=pages,
            page_at=page_at,
            lengths=lengths[changed],
            length_at=length_at,
            lost=lost,
            lost_at=lost_at,
            width=width,
        )

    def heads(self, rows: list[int]) -> tuple[Lengths, Pages]:
        """Entries [B, L, H_kv] and pages [B, L, H_kv, P] of every head of the rows."""
        with self._lock:
            return self._lengths[rows], self._pages[rows]

    def shorten(self, rows: list[int], lengths: Lengths) -> None:
        """Keep each head's first entries only, and free the pages that lose all theirs.

        lengths: [B, L, H_kv], at most what the heads have.
        """
        with self._lock:
            pages = self._pages[rows]  # a copy
            needed = np.arange(pages.shape[-1]) < self._pages_of(lengths)[..., None]
            self._give_back(pages[~needed & (pages > 0)])
            self._pages[rows] = np.where(needed, pages, 0)
            self._lengths[rows] = lengths
            self._has_other_lengths[rows] = True

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
            self._has_other_pages[row] = self._has_other_lengths[row] = True

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

    def _leave_windows(
        self, rows: Indices, positions: Sequence[int]
    ) -> tuple[Lengths, tuple[Indices, ...]]:
        """Free what tokens at the positions do not see; `lost` and `lost_at` of TableChanges."""
        windowed = np.array(self.windows.layers, dtype=np.int64)
        lengths = self._lengths[rows[:, None], windowed]  # [B, windowed layers, H_kv]
        lost = self.windows.pages_lost(lengths + 1, positions)
        batch, layer = lost.max(-1).nonzero()
        lost, at = lost[batch, layer], (windowed[layer], rows[batch])  # [k, H_kv]
        if len(lost):
            pages = self._pages[at[1], at[0], :, : self.windows.width]  # [k, H_kv, P]
            column = np.arange(pages.shape[-1])
            self._give_back(pages[column < lost[..., None]])
            pages = np.pad(pages, ((0, 0), (0, 0), (0, int(lost.max()))))
            left = np.take_along_axis(pages, column + lost[..., None], axis=-1)
            self._pages[at[1], at[0], :, : self.windows.width] = left
            self._lengths[at[1], at[0]] -= lost * self.page_size
        return lost, at

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


def _filled(layers: Indices, rows: Indices, last: Indices) -> tuple[Indices, ...]:
    """The places of heads' pages up to column `last`: (layer, row, head, column), one array each.

    layers, rows: [n].  last: [n, H_kv].
    """
    idx, head, column = (np.arange(last.max() + 1) <= last[..., None]).nonzero()
    return layers[idx], rows[idx], head, column
