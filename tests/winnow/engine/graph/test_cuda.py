"""What a capture leaves behind, with streams and graphs that stand in for CUDA's."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from winnow.engine.graph.cuda import CudaRecorder, refusing_waits

CUDA = torch.device("cuda")


class Stream:
    def wait_stream(self, stream: "Stream") -> None: ...


class Device:
    """current: the thread's stream.  is_allocating: for a capture.  fails: the capture does."""

    def __init__(self) -> None:
        self.default = self.current = Stream()
        self.is_allocating = False
        self.fails = False
        self.num_pools = 0

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, *_: object, stream: Stream, **__: object) -> "Graph":
        return Graph(self, stream)

    def end_allocating(self, *_: object) -> None:
        if not self.is_allocating:
            raise RuntimeError("not currently recording to mempool_id")
        self.is_allocating = False

    def release(self, *_: object) -> None:
        self.num_pools -= 1


class Graph:
    """As torch.cuda.graph, which goes off its stream only if its capture ends well."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream

    def __enter__(self) -> None:
        self._before, self._device.current = self._device.current, self._stream
        self._device.is_allocating = True
        self._device.num_pools += 1

    def __exit__(self, *_: object) -> None:
        if self._device.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._device.is_allocating = False
        self._device.current = self._before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_allocating, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", device.release, raising=False)
    return device


def test_a_step_is_captured_on_the_stream_of_its_warm_up(device: Device) -> None:
    streams: list[Stream] = []

    def step() -> tuple[Tensor, ...]:
        streams.append(device.current)
        return ()

    CudaRecorder().record(step)
    assert len(streams) == 3
    assert {*streams} & {device.default} == set()
    assert device.current is device.default
    assert device.num_pools == 1  # which is the graph's now


@pytest.mark.parametrize("fails", [True, False])
def test_after_a_capture_that_fails_work_goes_on_where_it_was(device: Device, fails: bool) -> None:
    """On another stream than the other threads' it would not wait for their writes."""
    device.fails = fails
    calls: list[int] = []

    def step() -> tuple[Tensor, ...]:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a step")
        return ()

    with pytest.raises(RuntimeError if fails else ValueError):
        CudaRecorder().record(step)
    assert device.current is device.default
    assert not device.is_allocating


def test_waits_are_refused_for_as_long_as_they_are_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | int] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ValueError, match="a step"), refusing_waits(CUDA):
        raise ValueError("a step")
    assert modes == [0, "error", 0]
    with refusing_waits(torch.device("cpu")):
        pass
    assert len(modes) == 3
