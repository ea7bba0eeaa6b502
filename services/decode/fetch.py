"""Fetch: sends a running request's KV, last queries and tokens to another worker."""

import logging
from collections.abc import Iterator

import grpc
import torch
from google.protobuf.message import DecodeError

from services.common.rpc import abort
from services.decode.active_request import ActiveRequest
from services.decode.admission import Admission
from services.decode.metrics import OUT, DecodeMetrics
from winnow.engine.kv_pool import KVPool
from winnow.engine.sequence import Sequence
from winnow.errors import TransferMalformed, UnknownReservation, WinnowError
from winnow.model_files import ModelDescription
from winnow.sampler_version import require_same_sampler
from winnow.v1 import decode_pb2 as pb
from winnow.wire import Header, Ticket, TransferEncoder

logger = logging.getLogger(__name__)


class KvSender:
    """Serves KvTransfer.Fetch."""

    def __init__(
        self, admission: Admission, metrics: DecodeMetrics, model: ModelDescription, pool: KVPool
    ) -> None:
        self._admission = admission
        self._metrics = metrics
        self._model = model
        self._pool = pool

    def fetch(self, body: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Frames of all the request's sequences; after the last frame the request has left."""
        try:
            asked = _parse(body)
            request = self._admission.find(asked.request_id)
            request.grant.require_fetch(asked.fetch_token)
            require_same_sampler(request.spec.sampling, asked.sampler_version)
            yield from self._send(request, asked)
        except WinnowError as error:
            logger.warning("fetch refused: %s", error)
            abort(context, error)

    def _send(self, request: ActiveRequest, asked: pb.FetchRequest) -> Iterator[bytes]:
        with request.given_away() as sequences:
            for left, seq in zip(reversed(range(len(sequences))), sequences, strict=True):
                yield from self._frames(request, seq, asked, left)
        self._metrics.sequences_moved.labels(OUT).inc(len(sequences))
        about = {"request_id": request.spec.request_id}
        logger.info("%d sequences moved to another worker", len(sequences), extra=about)

    def _frames(
        self, request: ActiveRequest, seq: Sequence, asked: pb.FetchRequest, left: int
    ) -> Iterator[bytes]:
        shape = self._model.shape
        header = Header(
            request_id=asked.into_request_id,
            attempt=1,
            ticket=Ticket(asked.wire_version, asked.transfer_token),
            fingerprint=seq.spec.fingerprint_of(self._model),
            shape=shape,
            num_prompt_tokens=seq.spec.num_prompt_tokens,
            sequence_idx=seq.sequence_idx,
            sequences_left=left,
            kv_dtype=self._pool.kv_dtype,
        )
        encoder = TransferEncoder(header)
        yield encoder.header()
        for layer_idx in range(shape.num_layers):
            if seq.reservation.cancelled:
                raise UnknownReservation(f"request {request.spec.request_id} has ended")
            layer = seq.read_layer(self._pool, layer_idx)
            window = shape.layers[layer_idx].window
            yield from encoder.layer(layer if window is None else layer.newest(window))
        hidden = torch.zeros(shape.hidden_size) if seq.final_hidden is None else seq.final_hidden
        yield encoder.trailer(hidden, request.report, seq.state())


def _parse(body: bytes) -> pb.FetchRequest:
    asked = pb.FetchRequest()
    try:
        asked.MergeFromString(body)
    except DecodeError as error:
        raise TransferMalformed(f"FetchRequest cannot be read: {error}") from error
    return asked
