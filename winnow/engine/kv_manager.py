"""What is promised of a KV pool, and kept: rows, and the pages that each may come to hold.

Rows and pages are promised together (`reserve`). The pages for what a row holds, or is about to
receive, are always there. Those that it may still grow into are too, unless promises exceed the
pool by `overcommit`; so whoever runs the rows claims what a step takes before it, and makes some of
them give way where that fails.
"""

import contextlib
import threading

from winnow.engine.kv_pool import KVPool
from winnow.engine.outputs import PoolStats
from winnow.engine.promises import Promise, Promises

_NOTHING = Promise(0, 0)


class KVManager:
    """Promises of one pool. Every method may be called from any thread.

    overcommit: what may be promised in all, in pools, 1 or more.
    """

    def __init__(self, pool: KVPool, num_rows: int, overcommit: float) -> None:
        self.pool = pool
        self._promises = Promises(pool.num_pages, num_rows, overcommit)
        self._lock = threading.RLock()

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
        """Lower a row's promise to what it holds and what it can still grow to.

        extra_entries, cap: as in `KVPool.pages_within_reach`.  assured: all of that is kept for it;
        other rows can give way from then on.
        """
        with self._lock:
            most = self.pool.pages_within_reach(row, extra_entries, cap)
            held = self.pool.pages_held(row)
            self._promises.change(row, Promise(most, most if assured else held))
            if not assured:
                self._promises.loosen(row)

    def claim(self, rows: list[int]) -> bool:
        """Keeps the pages that the next step of these rows takes; False if there are too few."""
        with self._lock:
            return self._promises.secure(self.pool.pages_after_step(rows))

    def evict(self, row: int) -> None:
        """Frees a row's pages and keeps none for it; `readmit` it before it is written again."""
        with self._lock:
            self.pool.clear(row)
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
                kv_bytes_used=used * pool.page_size * pool.shape.kv_bytes(1),
            )
