"""What a read of host memory waits for, with events and streams that stand in for CUDA's."""

import contextlib
from typing import Any

import pytest
import torch

from winnow.engine.prefix.reads import Reads


class Event:
    """done: whether the device has come to where it was recorded."""

    def __init__(self) -> None:
        self.done = False

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.done


class Stream:
    def __init__(self, *_: object) -> None:
        self.waits: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: object) -> None:
        self.waits.append(stream)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return stream


def waits_of_read(reads: Reads, group: int) -> list[Any]:
    """What the side stream is made to wait for."""
    side: Any = reads._side
    num_before = 0 if side is None else len(side.waits)
    with reads.after(group):
        pass
    side = reads._side
    waits: list[Any] = side.waits[num_before:]
    return waits


def test_a_read_waits_for_the_writes_of_what_it_reads_and_not_for_later_ones(
    current: Stream,
) -> None:
    reads = Reads(torch.device("cuda"))
    first = reads.note_write()
    assert reads.note_write() == first
    (written,) = waits_of_read(reads, first)
    second = reads.note_write()
    assert second > first
    assert waits_of_read(reads, first) == [written]  # not for the second
    (later,) = waits_of_read(reads, second)
    assert later is not written


def test_a_read_of_what_has_long_been_written_waits_for_nothing(current: Stream) -> None:
    reads = Reads(torch.device("cuda"))
    group = reads.note_write()
    (written,) = waits_of_read(reads, group)
    written.done = True
    reads.note_write()
    assert waits_of_read(reads, group) == []
    assert written not in [event for _, event in reads._written]


def test_the_device_goes_on_after_what_is_read(current: Stream) -> None:
    reads = Reads(torch.device("cuda"))
    waits_of_read(reads, reads.note_write())
    assert current.waits == [reads._side]


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    with Reads(torch.device("cpu")).after(-1) as copy:
        assert copy(tensor) is tensor
