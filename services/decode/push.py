"""KvTransfer.Push: receives prefill's KV into a request's reservation."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import torch

from services.common.rpc import abort
from services.common.tracing import context_in, span
from services.decode.active_request import ActiveRequest
from services.decode.admission import Admission
from services.decode.frames import Buffers, first_frame, receipt_of, refusal_logged, take_frames
from services.decode.kv_server import MAX_OPEN_TRANSFERS
from services.decode.metrics import DecodeMetrics
from services.decode.parts import BEGIN_TIMEOUT_S, RankedParts, take_part
from winnow.errors import Overloaded, WinnowError
from winnow.model_files import ModelDescription
from winnow.wire import Header, ReceiveBuffer, TransferDecoder, read_header


class KvReceiver:
    """Serves KvTransfer.Push, each transfer with a receive buffer.

    parts: of a worker of several ranks; None: all KV comes here.
    """

    def __init__(
        self,
        admission: Admission,
        metrics: DecodeMetrics,
        model: ModelDescription,
        device: torch.device,
        parts: RankedParts | None = None,
    ) -> None:
        self._admission = admission
        self._metrics = metrics
        self._model = model
        self._parts = parts
        self._buffers = Buffers(device)
        self._may_begin = threading.BoundedSemaphore(MAX_OPEN_TRANSFERS)

    @property
    def open_transfers(self) -> int:
        return self._buffers.num_lent

    def push(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The serialized receipt, after everything was received, checked and written."""
        try:
            parent = context_in(context.invocation_metadata())
            with span("kv.receive", parent, is_server=True), self._buffers.lent() as buffer:
                return self._receive(frames, context, buffer)
        except WinnowError as error:
            self._metrics.transfers_failed.labels(error.code).inc()
            abort(context, error)

    def _receive(
        self, frames: Iterator[bytes], context: grpc.ServicerContext, buffer: ReceiveBuffer
    ) -> bytes:
        with refusal_logged():
            first = first_frame(frames, context)
            header = read_header(first)
        with refusal_logged(header.request_id):
            if self._parts is not None and header.heads is not None and header.heads.start > 0:
                return take_part(self._parts.arrivals, first, frames, context.cancel, buffer)
            request = self._admission.find(header.request_id)
            expected = request.expected(self._model)
            if self._parts is not None and header.heads is not None:
                expected = self._parts.expected(expected)
            decoder = TransferDecoder(expected, buffer)
            decoder.feed(first)
            with self._begun():
                request.begin_attempt(header.attempt, context.cancel)
                try:
                    self._take(frames, decoder, request, header)
                except BaseException:  # a refusal, or grpc's exception when the sender has gone
                    request.drop_attempt(header.attempt)
                    raise
        return receipt_of(decoder)

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Around an attempt, so that there are MAX_OPEN_TRANSFERS at most.  Raises Overloaded.

        It waits no longer than parts wait for their attempt: it has a thread that the parts of
        others may need.
        """
        if not self._may_begin.acquire(timeout=BEGIN_TIMEOUT_S):
            raise Overloaded(
                f"{MAX_OPEN_TRANSFERS} transfers are open, and none ended in {BEGIN_TIMEOUT_S:g} s"
            )
        try:
            yield
        finally:
            self._may_begin.release()

    def _take(
        self,
        frames: Iterator[bytes],
        decoder: TransferDecoder,
        request: ActiveRequest,
        header: Header,
    ) -> None:
        """Write the layers into the reservation; start the request only after the last check."""
        attempt, heads = header.attempt, header.heads
        if heads is None:
            trailer = take_frames(
                frames, decoder, lambda layer: request.write_layer(attempt, layer)
            )
            num_bytes = decoder.payload_bytes
        else:
            assert self._parts is not None
            whole = request.expected(self._model)
            with self._parts.arriving(request, header, whole) as own:
                with own.part(heads):  # `request` cancels this one
                    trailer = take_frames(frames, decoder, lambda layer: own.add(heads, layer))
                    own.count(decoder.payload_bytes)
                num_bytes = self._parts.collect(request, attempt, own)
        request.arrive(attempt, trailer)
        self._metrics.received_bytes.inc(num_bytes)
