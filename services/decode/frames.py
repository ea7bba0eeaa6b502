"""What all receivers of KvTransfer.Push do with the frames of a transfer."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

import grpc
import torch

from winnow.errors import TransferDamaged, WinnowError
from winnow.kv import LayerKV
from winnow.v1 import decode_pb2 as pb
from winnow.wire import ReceiveBuffer, Trailer, TransferDecoder

logger = logging.getLogger(__name__)

FIRST_FRAME_TIMEOUT_S = 10.0


class Buffers:
    """Receive buffers, one for each transfer that is open."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: deque[ReceiveBuffer] = deque()
        self.num_lent = 0
        self._counting = threading.Lock()

    @contextlib.contextmanager
    def lent(self) -> Iterator[ReceiveBuffer]:
        with self._counting:
            self.num_lent += 1
            buffer = self._free.pop() if self._free else ReceiveBuffer(self._device)
        try:
            yield buffer
        finally:
            with self._counting:
                self.num_lent -= 1
                self._free.append(buffer)


@contextlib.contextmanager
def refusal_logged(request_id: str | None = None) -> Iterator[None]:
    try:
        yield
    except WinnowError as error:
        about = {"request_id": request_id} if request_id else {}
        logger.warning("transfer refused: %s", error, extra=about)
        raise


def first_frame(frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """The first frame; a sender that sends none in time is cancelled, which frees its thread."""
    watchdog = threading.Timer(FIRST_FRAME_TIMEOUT_S, context.cancel)
    watchdog.start()
    try:
        return next(frames)
    except StopIteration as error:
        raise TransferDamaged("transfer ended before its header") from error
    finally:
        watchdog.cancel()


def take_frames(
    frames: Iterator[bytes], decoder: TransferDecoder, write: Callable[[LayerKV], object]
) -> Trailer:
    """Write the layers; returns the trailer after the last check."""
    trailer = None
    for frame in frames:
        event = decoder.feed(frame)
        if isinstance(event, LayerKV):
            write(event)
        elif isinstance(event, Trailer):
            trailer = event
    decoder.require_complete()
    assert trailer is not None
    return trailer


def receipt_of(decoder: TransferDecoder) -> bytes:
    """The serialized receipt of a complete transfer."""
    receipt = pb.PushReceipt(payload_bytes=decoder.payload_bytes, num_layers=decoder.num_layers)
    return bytes(receipt.SerializeToString())
