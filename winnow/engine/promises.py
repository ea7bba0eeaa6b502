"""Bookkeeping of the KV pages and batch rows that are reserved."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from winnow.errors import InvalidSetting, Overloaded


@dataclass(slots=True)
class Promise:
    """Pages reserved for a row. most: it may grow to these; sure: set aside for it, used or not."""

    most: int
    sure: int


class Promises:
    """A Promise for each row in use; `sure` sums to at most the pool, `most` to `overcommit` pools.

    A row is firm at first: it cannot be preempted, since its KV is still arriving. Preempting the
    rows that are not firm always frees the `most` of any one row, so the oldest is never preempted.

    Counts pages, but does not track which ones. Not thread-safe: callers lock.
    """

    def __init__(self, num_pages: int, num_rows: int, overcommit: float) -> None:
        self._num_pages = num_pages
        self._most_promised = int(num_pages * overcommit)
        self._by_row: dict[int, Promise] = {}
        self._firm: set[int] = set()
        self._free_rows = list(reversed(range(num_rows)))

    def give(self, num_rows: int, promise: Promise) -> list[int]:
        """Allocate rows and reserve `promise` for each.

        Raises InvalidSetting if the whole pool could not hold them, Overloaded if there is no room
        for them now.
        """
        needed, free = num_rows * promise.most, self.free()
        if needed > self._num_pages:
            raise InvalidSetting(
                f"the request needs {needed:,} KV pages; the worker has {self._num_pages:,} in all"
            )
        if needed > free.most or num_rows * promise.sure > free.sure:
            raise Overloaded(
                f"the request needs {needed:,} KV pages; {min(free.most, free.sure):,} are free"
            )
        if not self._leaves_each_its_most(num_rows, promise):
            raise Overloaded(
                f"the request needs {needed:,} KV pages; too few would be left for those before it"
            )
        if num_rows > len(self._free_rows):
            raise Overloaded(
                f"the request needs {num_rows} places in the batch; {len(self._free_rows)} are free"
            )
        rows = [self._free_rows.pop() for _ in range(num_rows)]
        self._by_row.update({row: replace(promise) for row in rows})
        self._firm.update(rows)
        return rows

    def has_room(self, num_rows: int, promise: Promise, freed: Promise) -> bool:
        """Whether `give` would succeed if `freed` were free as well."""
        free = self.free()
        has_pages = (
            num_rows * promise.most <= free.most + freed.most
            and num_rows * promise.sure <= free.sure + freed.sure
        )
        has_pages = has_pages and self._leaves_each_its_most(num_rows, promise)
        return has_pages and num_rows <= len(self._free_rows)

    def _leaves_each_its_most(self, num_rows: int, promise: Promise) -> bool:
        """Whether any one row could still reach its `most` besides the new and the firm rows."""
        firm = num_rows * promise.sure + sum(self._by_row[row].sure for row in self._firm)
        to_come = [promise.most - promise.sure]
        for row, own in self._by_row.items():
            to_come.append(own.most - own.sure if row in self._firm else own.most)
        return firm + max(to_come) <= self._num_pages

    def loosen(self, row: int) -> None:
        """Allow the row to be preempted from now on."""
        self._firm.discard(row)

    def of(self, row: int) -> Promise:
        return replace(self._by_row[row])

    def change(self, row: int, promise: Promise) -> None:
        """Replace the row's promise; its `most` never rises."""
        most = min(promise.most, self._by_row[row].most)
        self._by_row[row] = Promise(most, min(promise.sure, most))

    def secure(self, needed: Mapping[int, int], *, spare: int = 0) -> bool:
        """Raise `sure` to at least `needed` per row; False, and no change, if there are too few.

        spare: pages that must stay free.
        """
        wanted = {row: max(0, own - self._by_row[row].sure) for row, own in needed.items()}
        if sum(wanted.values()) + spare > self.free().sure:
            return False
        for row, more in wanted.items():
            self._by_row[row].sure += more
        return True

    def unsecure(self, row: int) -> None:
        """Set no pages aside for the row any more; its `most` stays."""
        self._by_row[row].sure = 0

    def take_back(self, row: int) -> None:
        """Free the row."""
        del self._by_row[row]
        self._firm.discard(row)
        self._free_rows.append(row)

    def free(self) -> Promise:
        """What can still be reserved."""
        promises = self._by_row.values()
        return Promise(
            most=self._most_promised - self.most_in_all(),
            sure=self._num_pages - sum(promise.sure for promise in promises),
        )

    def most_in_all(self) -> int:
        """The sum of `most` over all rows."""
        return sum(promise.most for promise in self._by_row.values())
