"""KvTransfer.Push: receives prefill's KV into a request's reservation."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator

import grpc

from services.common.rpc import abort
from services.common.tracing import context_in, span
from services.decode.active_request import ActiveRequest
from services.decode.admission import Admission
from services.decode.metrics import DecodeMetrics
from winnow.errors import TransferDamaged, WinnowError
from winnow.kv import LayerKV, ModelShape
from winnow.v1 import decode_pb2 as pb
from winnow.wire import ReceiveBuffer, Trailer, TransferDecoder, read_header

logger = logging.getLogger(__name__)

MAX_OPEN_TRANSFERS = 32  # prompts that prefill workers compute for this one, paused ones too
FIRST_FRAME_TIMEOUT_S = 10.0


class KvReceiver:
    """Serves KvTransfer.Push, at most MAX_OPEN_TRANSFERS at once, each with a receive buffer."""

    def __init__(
        self,
        admission: Admission,
        metrics: DecodeMetrics,
        fingerprint: str,
        shape: ModelShape,
    ) -> None:
        self._admission = admission
        self._metrics = metrics
        self._fingerprint = fingerprint
        self._shape = shape
        self._buffers = deque(ReceiveBuffer() for _ in range(MAX_OPEN_TRANSFERS))

    @property
    def open_transfers(self) -> int:
        return MAX_OPEN_TRANSFERS - len(self._buffers)

    def push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The serialized receipt, after everything was received, checked and written."""
        try:
            parent = context_in(context.invocation_metadata())
            with span("kv.receive", parent, is_server=True), self._lent_buffer() as buffer:
                return self._receive(frames, context, buffer)
        except WinnowError as error:
            self._metrics.transfers_failed.labels(error.code).inc()
            abort(context, error)

    @contextlib.contextmanager
    def _lent_buffer(self) -> Iterator[ReceiveBuffer]:
        buffer = self._buffers.pop()  # one per thread, so there is always one
        try:
            yield buffer
        finally:
            self._buffers.append(buffer)

    def _receive(
        self, frames: Iterator[bytes], context: grpc.ServicerContext, buffer: ReceiveBuffer
    ) -> bytes:
        with _refusal_logged():
            first = _first_frame(frames, context)
            header = read_header(first)
        with _refusal_logged(header.request_id):
            request = self._admission.find(header.request_id)
            decoder = TransferDecoder(request.expected(self._fingerprint, self._shape), buffer)
            decoder.feed(first)
            request.begin_attempt(header.attempt, context.cancel)
            try:
                _take_frames(frames, decoder, request, header.attempt)
            except BaseException:  # a refusal, or grpc's exception when the sender has gone
                request.drop_attempt(header.attempt)
                raise
        self._metrics.received_bytes.inc(decoder.payload_bytes)
        receipt = pb.PushReceipt(payload_bytes=decoder.payload_bytes, num_layers=decoder.num_layers)
        return bytes(receipt.SerializeToString())


@contextlib.contextmanager
def _refusal_logged(request_id: str | None = None) -> Iterator[None]:
    try:
        yield
    except WinnowError as error:
        about = {"request_id": request_id} if request_id else {}
        logger.warning("transfer refused: %s", error, extra=about)
        raise


def _take_frames(
    frames: Iterator[bytes], decoder: TransferDecoder, request: ActiveRequest, attempt: int
) -> None:
    """Write the layers into the reservation; start the request only after the last check."""
    trailer = None
    for frame in frames:
        event = decoder.feed(frame)
        if isinstance(event, LayerKV):
            request.write_layer(attempt, event)
        elif isinstance(event, Trailer):
            trailer = event
    decoder.require_complete()
    assert trailer is not None
    request.arrive(attempt, trailer)


def _first_frame(frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """The first frame; a sender that sends none in time is cancelled, which frees its thread."""
    watchdog = threading.Timer(FIRST_FRAME_TIMEOUT_S, context.cancel)
    watchdog.start()
    try:
        return next(frames)
    except StopIteration as error:
        raise TransferDamaged("transfer ended before its header") from error
    finally:
        watchdog.cancel()
