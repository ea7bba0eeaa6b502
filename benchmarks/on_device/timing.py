"""Time of device work without the host's, and of steps with it."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_REPLAYS = 5


def device_seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Mean time of one of `runs`, as the device takes it.

    On CUDA all of them are captured in one graph, so that the host's launches do not count: none
    may wait for the device. The best of a few replays counts.
    """
    if device.type != "cuda":
        return _best_of(lambda: _run_all(runs)) / len(runs)
    _warm_up(runs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run_all(runs)
    graph.replay()
    seconds = [_event_seconds(graph.replay) for _ in range(_REPLAYS)]
    graph.reset()
    return min(seconds) / len(runs)


def _run_all(runs: Sequence[Callable[[], object]]) -> None:
    for run in runs:
        run()


def _warm_up(run: Callable[[], object]) -> None:
    """Compile what `run` launches, on another stream, as captures ask for."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _event_seconds(run: Callable[[], object]) -> float:
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _best_of(run: Callable[[], object]) -> float:
    run()
    return min(wall_seconds(run) for _ in range(3))


def wall_seconds(run: Callable[[], object]) -> float:
    """Time until the device is done with what `run` asks of it."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_call(run: Callable[[], object], calls: int, rounds: int) -> float:
    """Mean time of a call, as the median over the rounds; the first call is not counted."""
    run()
    return median(wall_seconds(lambda: _run_all([run] * calls)) / calls for _ in range(rounds))
