"""What leaves a device for the network: copied to host memory beside the device's work.

The engine starts a copy and goes on; the thread that sends waits for it, encodes, and gives the
buffer back. Buffers are used again: pinning memory takes longer than copying into it.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import accumulate, chain
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from winnow.side_stream import SideStream

T = TypeVar("T", bound=Any)  # a dataclass with tensors

_ALIGNMENT = 16


class CopyStream(Protocol):
    """As SideStream."""

    def empty(self, num_bytes: int) -> Tensor: ...

    def copy_out(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]: ...


class Outgoing(Generic[T]):
    """An item whose copy has been started. As a context it is the item in host memory.

    Entering the context waits for the copy; leaving it gives the buffer back, as does `release` in
    its place.
    """

    def __init__(self, item: T, wait: Callable[[], None], give_back: Callable[[], None]) -> None:
        self._item = item
        self._wait = wait
        self._give_back = give_back

    def __enter__(self) -> T:
        try:
            self._wait()
        except BaseException:
            self.release()
            raise
        return self._item

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the buffer back, which has a further effect only the first time."""
        give_back, self._give_back = self._give_back, _nothing
        give_back()


class OutgoingBuffers:
    """Host memory for copies that are being sent. Any thread may use it.

    stream: makes the copies; None: items are in host memory already, and are not copied.
    num_kept: free buffers that are kept for the next copies, 1 or more.
    """

    def __init__(self, stream: CopyStream | None = None, num_kept: int = 1) -> None:
        self._stream = stream
        self._num_kept = num_kept
        self._num_used = 0
        self._free: list[Tensor] = []  # by size
        self._lock = threading.Lock()

    @classmethod
    def of(cls, device: torch.device, num_kept: int) -> "OutgoingBuffers":
        """For items on the device."""
        return cls(SideStream(device) if device.type == "cuda" else None, num_kept)

    @property
    def num_used(self) -> int:
        """Buffers that were not given back yet."""
        return self._num_used

    def copy(self, item: T) -> Outgoing[T]:
        """Start copying all tensors of a dataclass, and tuples of them; waits for nothing."""
        if self._stream is None:
            return Outgoing(item, _nothing, _nothing)
        by_name = {field.name: _tensors(getattr(item, field.name)) for field in fields(item)}
        sources = list(chain.from_iterable(by_name.values()))
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in sources]
        buffer = self._take(sum(sizes))
        give_back = partial(self._put_back, buffer)
        try:
            starts = accumulate(sizes, initial=0)
            targets = [_part(buffer, *place) for place in zip(starts, sources, strict=False)]
            copied = self._stream.copy_out(list(zip(targets, sources, strict=True)))
            left = iter(targets)
            changes = {
                name: _like(getattr(item, name), [next(left) for _ in tensors])
                for name, tensors in by_name.items()
                if tensors
            }
            return Outgoing(replace(item, **changes), copied, give_back)
        except BaseException:
            give_back()
            raise

    def _take(self, num_bytes: int) -> Tensor:
        """The smallest free buffer that is large enough, or a new one in place of the largest."""
        assert self._stream is not None
        with self._lock:
            fitting = (idx for idx, own in enumerate(self._free) if len(own) >= num_bytes)
            idx = next(fitting, None)
            if idx is not None:
                buffer = self._free.pop(idx)
            else:
                del self._free[-1:]
                buffer = self._stream.empty(num_bytes)
            self._num_used += 1
        return buffer

    def _put_back(self, buffer: Tensor) -> None:
        with self._lock:
            self._num_used -= 1
            self._free = sorted([*self._free, buffer], key=len)[-self._num_kept :]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _tensors(value: object) -> list[Tensor]:
    """The tensors of a field: its own, or those of a tuple."""
    values = value if isinstance(value, tuple) else (value,)
    return [one for one in values if isinstance(one, Tensor)]


def _like(value: object, copies: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """What a field with these tensors becomes."""
    return tuple(copies) if isinstance(value, tuple) else copies[0]


def _nothing() -> None:
    pass
