"""Objects with tensors through a pipe, by copies of their bytes; of a view only its own."""

import io
import os
import socket
import struct
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias

import torch
from torch import Tensor

Pipe: TypeAlias = "Connection[Any, Any]"


def limit_waiting(pipe: Pipe, timeout: timedelta) -> None:
    """Have `send` and `receive` raise OSError when nothing has moved for so long."""
    seconds, rest = divmod(timeout, timedelta(seconds=1))
    interval = struct.pack("@ll", seconds, rest // timedelta(microseconds=1))
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, interval)


def pack(value: object) -> memoryview:
    """What `receive` makes the value of, to be sent by `pipe.send_bytes`."""
    buffer = io.BytesIO()
    _Pickler(buffer, -1).dump(value)  # of the newest protocol
    return buffer.getbuffer()


def send(pipe: Pipe, value: object) -> None:
    """Raises OSError if the other end is gone."""
    pipe.send_bytes(pack(value))


def receive(pipe: Pipe) -> Any:  # noqa: ANN401 - whatever was sent
    """Raises EOFError or OSError if the other end is gone."""
    return pipe.recv()


class _Pickler(ForkingPickler):
    """torch's own way would send a view's whole storage."""

    def reducer_override(self, value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Tensor):
            return NotImplemented
        raw = value.detach().contiguous().view(-1).view(torch.uint8)
        return _tensor, (bytearray(raw.numpy()), value.dtype, tuple(value.shape))


def _tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(shape)
