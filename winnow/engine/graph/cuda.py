"""Recording with CUDA graphs."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

CudaGraphs = Literal["auto", "off"]

_WARM_UPS = 2  # libraries choose algorithms and allocate workspace at first


class CudaRecording:
    """A captured graph and its outputs."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...]) -> None:
        self._graph = graph
        self._outputs = outputs

    def replay(self) -> tuple[Tensor, ...]:
        self._graph.replay()
        return self._outputs


class CudaRecorder:
    """A Recorder whose graphs allocate from one memory pool, on one stream.

    Memory that was freed on a stream is only given out again on the same one.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        # A graph cannot be captured on the default stream.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> CudaRecording:
        side = self._stream
        side.wait_stream(torch.cuda.current_stream())
        # A capture that fails leaves the thread on its stream; this takes it off in any case.
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
            recording = self._captured(step)
        torch.cuda.current_stream().wait_stream(side)
        return recording

    def _captured(self, step: Callable[[], tuple[Tensor, ...]]) -> CudaRecording:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile, for KV that arrives.
            with torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = step()
        except BaseException:
            self._end_allocating()
            raise
        return CudaRecording(graph, outputs)

    def _end_allocating(self) -> None:
        """Have the allocator know that a capture has failed, which PyTorch does not always tell it.

        It would never again use memory that was read on a second stream.
        """
        with contextlib.suppress(RuntimeError):  # it has been told
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._memory)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._memory)


def recorder_for(
    device: torch.device, cuda_graphs: CudaGraphs = "auto"
) -> type[CudaRecorder] | None:
    """What makes the device's recorders; None where steps are launched kernel by kernel."""
    return CudaRecorder if device.type == "cuda" and cuda_graphs == "auto" else None


@contextlib.contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """In it, an operation that makes the host wait for a CUDA device raises RuntimeError.

    That goes for all threads.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see what other libraries wait for
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
