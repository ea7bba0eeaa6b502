"""Copies from host memory to a CUDA device, made beside its work.

What they read was written on the stream of that work. They wait for these writes, not for what the
device has been given since.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Reads:
    """Reads of host memory that the device writes.  On a CPU they are in order anyhow.

    Writes are numbered in groups, one for those between two reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: torch.cuda.Stream | None = None
        self._group = 0
        self._has_writes = False
        self._written: deque[tuple[int, torch.cuda.Event]] = deque()  # groups that may be unwritten

    def note_write(self) -> int:
        """The group of a write that the current stream has just been given."""
        self._has_writes = True
        return self._group

    @contextlib.contextmanager
    def after(self, group: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """In the context, all work is beside the device's; it gives what copies a tensor there.

        group: the newest of what is read.  What the device is given after the context waits for it.
        """
        if self._device.type != "cuda":
            yield lambda tensor: tensor.to(self._device, non_blocking=True)
            return
        current = torch.cuda.current_stream(self._device)
        self._end_group(current)
        side = self._side = self._side or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        copies = []

        def copy(tensor: Tensor) -> Tensor:
            copies.append(tensor.to(self._device, non_blocking=True))
            return copies[-1]

        with torch.cuda.stream(side):
            for own, written in self._written:
                if own == group:  # else it is written already
                    side.wait_event(written)
            yield copy
        current.wait_stream(side)
        for tensor in copies:
            tensor.record_stream(current)

    def _end_group(self, current: torch.cuda.Stream) -> None:
        while self._written and self._written[0][1].query():  # type: ignore[no-untyped-call]
            self._written.popleft()
        if self._has_writes:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(current)
            self._written.append((self._group, event))
            self._group, self._has_writes = self._group + 1, False
