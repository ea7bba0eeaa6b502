"""What is promised of a KV pool's pages and of its places in the batch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from winnow.errors import InvalidSetting, Overloaded


@dataclass(slots=True)
class Promise:
    """Pages of a row. most: that it may come to hold; sure: that are kept for it, used or not."""

    most: int
    sure: int


class Promises:
    """One for each row in use. At most all pages are sure, and `overcommit` times them promised.

    A row is firm at first: nobody can make it give way, since its KV is on the way. Every row could
    have its most if those that are not firm gave way; so the oldest one never has to.

    Knows no pages, only their number, and no threads: whoever shares it locks.
    """

    def __init__(self, num_pages: int, num_rows: int, overcommit: float) -> None:
        self._num_pages = num_pages
        self._most_promised = int(num_pages * overcommit)
        self._by_row: dict[int, Promise] = {}
        self._firm: set[int] = set()
        self._free_rows = list(reversed(range(num_rows)))

    def give(self, num_rows: int, promise: Promise) -> list[int]:
        """Rows with that promise to each.

        Raises InvalidSetting if all pages together could not hold them, Overloaded if there is no
        room for them now.
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
        """Whether `give` would succeed, once `freed` were free besides."""
        free = self.free()
        has_pages = (
            num_rows * promise.most <= free.most + freed.most
            and num_rows * promise.sure <= free.sure + freed.sure
        )
        has_pages = has_pages and self._leaves_each_its_most(num_rows, promise)
        return has_pages and num_rows <= len(self._free_rows)

    def _leaves_each_its_most(self, num_rows: int, promise: Promise) -> bool:
        """Whether any row could have its most, beside such rows and all that is firm."""
        firm = num_rows * promise.sure + sum(self._by_row[row].sure for row in self._firm)
        to_come = [promise.most - promise.sure]
        for row, own in self._by_row.items():
            to_come.append(own.most - own.sure if row in self._firm else own.most)
        return firm + max(to_come) <= self._num_pages

    def loosen(self, row: int) -> None:
        """The row can be made to give way from now on."""
        self._firm.discard(row)

    def of(self, row: int) -> Promise:
        return replace(self._by_row[row])

    def change(self, row: int, promise: Promise) -> None:
        """To `promise`, but what the row may come to hold never rises."""
        most = min(promise.most, self._by_row[row].most)
        self._by_row[row] = Promise(most, min(promise.sure, most))

    def secure(self, needed: Mapping[int, int], *, spare: int = 0) -> bool:
        """Keeps at least so many pages for each row; False, and nothing, if there are too few.

        spare: pages that must be free after that.
        """
        wanted = {row: max(0, own - self._by_row[row].sure) for row, own in needed.items()}
        if sum(wanted.values()) + spare > self.free().sure:
            return False
        for row, more in wanted.items():
            self._by_row[row].sure += more
        return True

    def unsecure(self, row: int) -> None:
        """Keeps no page for it any more; it may still come to hold as many."""
        self._by_row[row].sure = 0

    def take_back(self, row: int) -> None:
        """The row is free for somebody else."""
        del self._by_row[row]
        self._firm.discard(row)
        self._free_rows.append(row)

    def free(self) -> Promise:
        """That could still be given."""
        promises = self._by_row.values()
        return Promise(
            most=self._most_promised - self.most_in_all(),
            sure=self._num_pages - sum(promise.sure for promise in promises),
        )

    def most_in_all(self) -> int:
        """Pages that all rows together may come to hold."""
        return sum(promise.most for promise in self._by_row.values())
