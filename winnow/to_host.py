"""Copies from the device to host memory that the host waits for when it reads them."""

import torch
from torch import Tensor


class HostCopy:
    """A copy that begins at once, after what is enqueued already and before what comes next.

    The tensor must not change until `wait` has returned, unless by what is enqueued later.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The copy; waits for the device, but not for what was enqueued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor
