"""Recording with CUDA graphs."""

from collections.abc import Callable
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
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile, for KV that arrives.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=side, capture_error_mode="thread_local"
        ):
            outputs = step()
        return CudaRecording(graph, outputs)


def recorder_for(
    device: torch.device, cuda_graphs: CudaGraphs = "auto"
) -> type[CudaRecorder] | None:
    """What makes the device's recorders; None where steps are launched kernel by kernel."""
    return CudaRecorder if device.type == "cuda" and cuda_graphs == "auto" else None
