"""Copies beside a CUDA device's work, and how far the host may be ahead of that work."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from winnow.to_device import tensor_to_device


class SideStream:
    """Copies between the device and host memory that run beside what the device computes.

    PyTorch does not use memory again, on either side, that such a copy still needs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.inference_mode(mode=False)  # or it could only be written to in that mode
    def empty(self, num_bytes: int) -> Tensor:
        """Pinned host memory [num_bytes] uint8, with any content."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy_out(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copies to pinned memory, of (target, source) each, of what is computed by then.

        Returns what waits for them, on any thread.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        return partial(self._wait, done)

    def _wait(self, event: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device):  # or a new thread would begin to use the first GPU
            event.synchronize()

    def copy_in(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device, for which what it is given to compute from now on waits.

        Those that are on the device already are not copied.
        """
        if all(tensor.device.type == self._device.type for tensor in tensors):
            return list(tensors)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [tensor_to_device(tensor, self._device) for tensor in tensors]
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)
        return copies


def copier_to(device: torch.device) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What brings tensors from host memory to the device, on CUDA beside its work."""
    if device.type == "cuda":
        return SideStream(device).copy_in
    return lambda tensors: [tensor_to_device(tensor, device) for tensor in tensors]


class Pace:
    """Keeps the host from running far ahead of a CUDA device; on a CPU it never does.

    A device that has one more step to do is not idle. Further steps would only be given to it
    before a more urgent one could come.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.cuda.Event] = deque()

    def end_step(self, ahead: int) -> None:
        """Note that a step has been given to the device; wait until it has `ahead` left to end."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        while len(self._events) > ahead:
            self._events.popleft().synchronize()
