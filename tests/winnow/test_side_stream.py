"""How far the host runs ahead, with events that stand in for CUDA's."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from winnow.side_stream import Pace, SideStream


def test_the_host_is_one_step_ahead_of_the_device_and_at_the_end_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[object] = []
    awaited: list[object] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking  # a thread that spins would take a core

        def record(self, stream: object) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            awaited.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    pace = Pace(torch.device("cuda"))
    for num_steps in range(1, 5):
        pace.end_step(ahead=1)
        assert awaited == recorded[: num_steps - 1]
    pace.end_step(ahead=0)
    assert awaited == recorded
    assert len(recorded) == 5


def test_a_cpu_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "Event")
    Pace(torch.device("cpu")).end_step(ahead=0)


def test_a_thread_waits_for_a_copy_on_the_device_of_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[object] = []
    waited_on: list[object] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None:
            waited_on.extend(devices)

    class Stream:
        def __init__(self, device: object) -> None: ...
        def wait_stream(self, stream: object) -> None: ...

    @contextlib.contextmanager
    def on(device: object) -> Iterator[None]:
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", on)
    second = torch.device("cuda:1")
    wait = SideStream(second).copy_out([])
    wait()
    assert waited_on == [second]
