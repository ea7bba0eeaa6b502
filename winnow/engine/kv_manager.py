"""Reservations on a KV pool: rows, and the pages that each row may grow to.

Rows and pages are reserved together (`reserve`). Pages for what a row holds or is about to receive
are always available. So are the pages it may still grow into, unless `overcommit` is above 1: the
scheduler therefore claims a step's pages before the step, and preempts sequences if that fails.
"""

import contextlib
import threading

from winnow.engine.kv_pool import KVPool
from winnow.engine.outputs import PoolStats
from winnow.engine.promises import Promise, Promises

_NOTHING = Promise(0, 0)


class KVManager:
    """Reservations on one pool. Every method may be called from any thread.

    overcommit: pages that may be reserved in total, in multiples of the pool, 1 or more.
    """

    def __init__(self, pool: KVPool, num_rows: int, overcommit: float) -> None:
        self.pool = pool
        self._promises = Promises(pool.num_pages, num_rows, overcommit)
        self._lock = threading.RLock()

    def reserve(self, num_rows: int, promise: Promise) -> list[int]:
        """Allocate rows and reserve `promise` for each.

        Raises InvalidSetting if the pool could never hold them, Overloaded if it cannot now.
        """
        with self._lock:
            return self._promises.give(num_rows, promise)

    def has_room(self, num_rows: int, promise: Promise, freed: Promise = _NOTHING) -> bool:
        """Whether `reserve` would succeed if `freed` were free as well."""
        with self._lock:
            return self._promises.has_room(num_rows, promise, freed)

    def promised(self, row: int) -> Promise:
        with self._lock:
            return self._promises.of(row)

    def settle(self, row: int, extra_entries: int, cap: int, *, assured: bool = False) -> None:
        """Lower a row's reservation to what it holds and what it can still grow to.

        extra_entries, cap: as in `PageTable.pages_within_reach`.  assured: set all of that aside
        for it; any other row can be preempted from then on.
        """
        with self._lock:
            most = self.pool.table.pages_within_reach(row, extra_entries, cap)
            held = self.pool.table.pages_held(row)
            self._promises.change(row, Promise(most, most if assured else held))
            if not assured:
                self._promises.loosen(row)

    def claim(self, rows: list[int]) -> bool:
        """Set aside the pages that these rows' next step takes; False if there are too few."""
        with self._lock:
            return self._promises.secure(self.pool.table.pages_after_step(rows))

    def evict(self, row: int) -> None:
        """Free a row's pages and set none aside; call `readmit` before writing it again."""
        with self._lock:
            self.pool.clear(row)
            self._promises.unsecure(row)

    def readmit(self, row: int, num_pages: int, *, spare: int) -> bool:
        """Set pages aside for an evicted row if at least `spare` others stay free."""
        with self._lock:
            return self._promises.secure({row: num_pages}, spare=spare)

    def release(self, *rows: int) -> None:
        """Free rows, their pages and their reservations.

        Reservations are freed even if freeing pages fails; pages that a row still holds then are
        freed when the row is next written.
        """
        with self._lock, contextlib.ExitStack() as steps:  # runs in reverse order
            for row in rows:
                steps.callback(self._promises.take_back, row)
                steps.callback(self.pool.clear, row)

    def stats(self) -> PoolStats:
        pool = self.pool
        with self._lock:
            used, free = pool.num_used, self._promises.free()
            return PoolStats(
                pages_total=pool.num_pages,
                pages_used=used,
                pages_reserved=self._promises.most_in_all(),
                pages_free=max(0, min(free.most, free.sure)),
                page_size=pool.page_size,
                kv_bytes_used=pool.num_ranks * pool.kv_bytes(used * pool.page_size),
            )
