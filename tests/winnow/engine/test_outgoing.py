"""Copies on their way to the network, on a stream that makes them as late as it may."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow.engine.late_copies import LateCopies
from winnow.engine.outgoing import Outgoing, OutgoingBuffers


@dataclass(frozen=True)
class Item:
    name: str
    floats: Tensor
    none: None
    numbers: Tensor
    several: tuple[Tensor, ...] = ()


def item(num: int, size: int = 5) -> Item:
    several = (torch.full((size,), num), torch.full((2,), num))
    return Item(
        str(num), torch.full((size, 3), float(num)), None, torch.arange(size) + num, several
    )


def assert_same(found: Item, expected: Item) -> None:
    assert found.name == expected.name
    assert torch.equal(found.floats, expected.floats)
    assert torch.equal(found.numbers, expected.numbers)
    assert len(found.several) == len(expected.several)
    assert all(map(torch.equal, found.several, expected.several))


def test_what_is_in_host_memory_is_not_copied() -> None:
    buffers, own = OutgoingBuffers.of(torch.device("cpu"), 4), item(1)
    with buffers.copy(own) as found:
        assert found is own
    assert buffers.num_used == 0


def test_a_copy_is_waited_for_before_it_is_read() -> None:
    buffers = OutgoingBuffers(LateCopies())
    own = Item("", torch.randn(3, 5).to(torch.bfloat16), None, torch.arange(7, dtype=torch.int32))
    with buffers.copy(own) as found:
        assert found.floats.data_ptr() != own.floats.data_ptr()
        assert found.floats.dtype == torch.bfloat16
        assert_same(found, own)


@given(st.lists(st.tuples(st.sampled_from(["copy", "send", "drop"]), st.integers(0, 40))))
def test_a_buffer_is_used_again_only_when_it_was_given_back(steps: list[tuple[str, int]]) -> None:
    """Also where a copy that nobody reads has yet to be made into a buffer that is used again."""
    buffers = OutgoingBuffers(LateCopies(), num_kept=2)
    waiting: list[tuple[Item, Outgoing[Item]]] = []
    for num, (step, size) in enumerate(steps):
        if step == "copy":
            waiting.append((own := item(num, size), buffers.copy(own)))
        elif waiting and step == "send":
            expected, outgoing = waiting.pop(0)
            with outgoing as found:
                assert_same(found, expected)
        elif waiting:
            outgoing = waiting.pop(0)[1]
            outgoing.release()
            outgoing.release()  # has no further effect
        assert buffers.num_used == len(waiting)
        assert len(buffers._free) <= 2
    for expected, outgoing in waiting:
        with outgoing as found:
            assert_same(found, expected)
    assert buffers.num_used == 0


def test_a_ring_of_buffers_serves_any_number_of_copies() -> None:
    stream = LateCopies()
    buffers = OutgoingBuffers(stream, num_kept=4)
    for num in range(0, 40, 4):
        for outgoing in [buffers.copy(item(num + idx)) for idx in range(4)]:
            outgoing.release()
    assert len(stream.allocated) == 4


def test_buffers_grow_with_what_is_sent_and_their_number_does_not() -> None:
    stream = LateCopies()
    buffers = OutgoingBuffers(stream, num_kept=2)
    for size in (1, 10, 100, 5, 100, 1000, 100):
        buffers.copy(item(1, size)).release()
    assert len(stream.allocated) == 4
    assert [len(buffer) for buffer in buffers._free] == [stream.allocated[-1]]


def test_a_copy_that_cannot_be_started_takes_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = LateCopies()
    buffers = OutgoingBuffers(stream)

    def fail(*_: object) -> None:
        raise RuntimeError("no such stream")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no such stream"):
        patch.setattr(stream, "copy_out", fail)
        buffers.copy(item(1))
    assert buffers.num_used == 0


def test_a_copy_that_fails_gives_its_buffer_back() -> None:
    stream = LateCopies()
    buffers = OutgoingBuffers(stream)
    outgoing = buffers.copy(item(1))
    stream.error = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"), outgoing:
        pass
    assert buffers.num_used == 0
