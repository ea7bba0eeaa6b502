import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from winnow.engine.promises import Promise, Promises
from winnow.errors import InvalidSetting, Overloaded

NUM_PAGES, NUM_ROWS, OVERCOMMIT = 100, 4, 1.5
PAGES = st.integers(0, 120)


def some_promise(most: int, sure: int) -> Promise:
    return Promise(most, min(most, sure))


class Histories(RuleBasedStateMachine):
    """Rows come, change and go; `kept` is what a reader of the docstrings would note."""

    def __init__(self) -> None:
        super().__init__()
        self.promises = Promises(NUM_PAGES, NUM_ROWS, OVERCOMMIT)
        self.kept: dict[int, Promise] = {}
        self.firm: set[int] = set()

    @rule(num_rows=st.integers(1, 3), promise=st.builds(some_promise, PAGES, PAGES))
    def give(self, num_rows: int, promise: Promise) -> None:
        fits = self.promises.has_room(num_rows, promise, Promise(0, 0))
        try:
            rows = self.promises.give(num_rows, promise)
        except (InvalidSetting, Overloaded):
            assert not fits or num_rows * promise.most > NUM_PAGES
            return
        assert fits
        assert not set(rows) & set(self.kept)
        self.kept |= dict.fromkeys(rows, promise)
        self.firm |= set(rows)

    @precondition(lambda self: self.firm)
    @rule(data=st.data())
    def loosen(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.firm)))
        self.promises.loosen(row)
        self.firm.remove(row)

    @precondition(lambda self: self.kept.keys() - self.firm)
    @rule(data=st.data(), needed=PAGES, spare=st.integers(0, 10))
    def secure(self, data: st.DataObject, needed: int, spare: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.kept.keys() - self.firm)))
        before = self.kept[row]
        needed = min(needed, before.most)
        free = NUM_PAGES - sum(promise.sure for promise in self.kept.values())
        possible = max(0, needed - before.sure) + spare <= free
        assert self.promises.secure({row: needed}, spare=spare) == possible
        if possible:
            self.kept[row] = Promise(before.most, max(before.sure, needed))

    @precondition(lambda self: self.kept.keys() - self.firm)
    @rule(data=st.data())
    def unsecure(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.kept.keys() - self.firm)))
        self.promises.unsecure(row)
        self.kept[row] = Promise(self.kept[row].most, 0)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.kept)))
        self.promises.take_back(row)
        del self.kept[row]
        self.firm.discard(row)

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        assert {row: self.promises.of(row) for row in self.kept} == self.kept
        most = sum(promise.most for promise in self.kept.values())
        sure = sum(promise.sure for promise in self.kept.values())
        assert self.promises.most_in_all() == most <= NUM_PAGES * OVERCOMMIT
        assert sure <= NUM_PAGES
        assert self.promises.free() == Promise(int(NUM_PAGES * OVERCOMMIT) - most, NUM_PAGES - sure)

    @invariant()
    def any_row_could_have_its_most_if_the_others_gave_way(self) -> None:
        for row, promise in self.kept.items():
            others = sum(self.kept[other].sure for other in self.firm - {row})
            assert promise.most + others <= NUM_PAGES


TestHistories = Histories.TestCase


def test_refusals_name_what_is_missing() -> None:
    promises = Promises(num_pages=100, num_rows=2, overcommit=1.0)
    with pytest.raises(InvalidSetting, match="needs 101 KV pages; the worker has 100 in all"):
        promises.give(1, Promise(101, 101))
    promises.give(1, Promise(60, 60))
    with pytest.raises(Overloaded, match="needs 41 KV pages; 40 are free"):
        promises.give(1, Promise(41, 41))
    with pytest.raises(Overloaded, match="needs 2 places in the batch; 1 are free"):
        promises.give(2, Promise(10, 10))
    promises.give(1, Promise(40, 40))
    promises = Promises(num_pages=100, num_rows=2, overcommit=2.0)
    promises.give(1, Promise(80, 30))
    with pytest.raises(Overloaded, match="needs 40 KV pages; too few would be left for those"):
        promises.give(1, Promise(40, 21))
    promises.give(1, Promise(40, 20))


@given(PAGES, PAGES)
def test_what_a_row_may_come_to_hold_never_rises(most: int, sure: int) -> None:
    promises = Promises(NUM_PAGES, NUM_ROWS, OVERCOMMIT)
    (row,) = promises.give(1, Promise(50, 50))
    promises.change(row, Promise(most, sure))
    assert promises.of(row) == Promise(min(most, 50), min(most, sure, 50))
