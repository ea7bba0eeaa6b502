"""The receiving side of Fetch: takes over a request that runs on another worker."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch

from services.common.rpc import error_from_rpc
from services.common.tls import PeerTls, open_channel
from services.decode.active_request import ActiveRequest
from services.decode.metrics import IN, DecodeMetrics
from winnow.decoder import DecoderModel
from winnow.errors import (
    DeliveryFailed,
    TransferDamaged,
    TransferMalformed,
    WinnowError,
)
from winnow.kv import LayerKV, SequenceState
from winnow.report import PrefillReport
from winnow.sampler_version import SAMPLER_VERSION
from winnow.v1 import decode_pb2 as pb
from winnow.wire import Header, ReceiveBuffer, Trailer, TransferDecoder

logger = logging.getLogger(__name__)

MAX_FETCHES = 4  # at once; requests of waiting ones keep running on their old worker
FETCH_TIMEOUT_S = 120.0  # the gateway gives up earlier if nothing arrives
_ATTEMPT = 1


class Fetcher:
    """Fetches requests in its own threads."""

    def __init__(self, model: DecoderModel, metrics: DecodeMetrics, peers: PeerTls | None) -> None:
        self._model = model
        self._metrics = metrics
        self._peers = peers
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "winnow-fetch")

    def begin(self, request: ActiveRequest, origin: pb.Origin) -> None:
        """Start a fetch and return; the request will run, or receive a DeliveryFailed."""
        self._threads.submit(self._run, request, origin)

    def stop(self) -> None:
        """Return when every thread has ended; closing a request ends its fetch."""
        self._threads.shutdown(cancel_futures=True)

    def _run(self, request: ActiveRequest, origin: pb.Origin) -> None:
        try:
            self._fetch(request, origin)
        except WinnowError as error:
            failure = f"KV could not be fetched from {origin.kv_address}: {error.message}"
            request.post(DeliveryFailed(failure))
        except Exception as error:  # otherwise lost: the thread's future is not awaited
            logger.exception("a fetch broke", extra={"request_id": request.spec.request_id})
            request.post(DeliveryFailed(f"a fetch broke: {error}"))

    def _fetch(self, request: ActiveRequest, origin: pb.Origin) -> None:
        ticket = request.grant.ticket(_ATTEMPT)
        asked = pb.FetchRequest(
            request_id=origin.request_id,
            fetch_token=origin.fetch_token,
            into_request_id=request.spec.request_id,
            wire_version=ticket.wire_version,
            transfer_token=ticket.token,
            sampler_version=SAMPLER_VERSION,
        )
        with open_channel(origin.kv_address, self._peers) as channel:
            fetch = channel.unary_stream(
                "/winnow.v1.KvTransfer/Fetch",
                request_serializer=pb.FetchRequest.SerializeToString,
                response_deserializer=None,  # frames stay bytes
            )
            calls: list[grpc.Call] = []
            request.begin_attempt(_ATTEMPT, lambda: [call.cancel() for call in calls])
            frames = fetch(asked, timeout=FETCH_TIMEOUT_S)
            calls.append(frames)
            try:
                arrivals = self._take(frames, request)
            except grpc.RpcError as error:
                raise error_from_rpc(error) from error
            finally:
                frames.cancel()
        request.arrive_running(_ATTEMPT, arrivals.report, arrivals.states, arrivals.final_hidden)
        self._metrics.sequences_moved.labels(IN).inc(len(arrivals.states))

    def _take(self, frames: Iterable[bytes], request: ActiveRequest) -> "_Arrivals":
        expected = request.expected(self._model.description, running=True)
        arrivals = _Arrivals(request.spec.num_sequences, self._model)
        buffer, decoder = ReceiveBuffer(self._model.device), None
        for frame in frames:
            decoder = decoder or TransferDecoder(expected, buffer)
            event = decoder.feed(frame)
            if isinstance(event, Header):
                arrivals.begin(event)
            elif isinstance(event, LayerKV):
                request.write_layer(_ATTEMPT, event, arrivals.sequence_idx)
            elif isinstance(event, Trailer):
                arrivals.end(event)
                self._metrics.received_bytes.inc(decoder.payload_bytes)
                decoder = None
        arrivals.require_complete(between_transfers=decoder is None)
        return arrivals


class _Arrivals:
    """The sequences of one Fetch as they arrive."""

    report: PrefillReport

    def __init__(self, num_sequences: int, model: DecoderModel) -> None:
        self.final_hidden = torch.zeros(model.shape.hidden_size)
        self.states: dict[int, SequenceState] = {}
        self.sequence_idx = -1
        self._num_sequences = num_sequences
        self._vocab_size = model.vocab_size
        self._left: int | None = None  # sequences to follow the current one

    def begin(self, header: Header) -> None:
        idx, left = header.sequence_idx, header.sequences_left
        if idx >= self._num_sequences or idx in self.states:
            raise TransferMalformed(
                f"sequence {idx} arrives; the request has {self._num_sequences}, each once"
            )
        if left != (self._left - 1 if self._left is not None else left):
            raise TransferDamaged(f"{left} sequences are to follow where {self._left} were")
        self.sequence_idx, self._left = idx, left

    def end(self, trailer: Trailer) -> None:
        assert trailer.state is not None
        highest = max(trailer.state.token_ids, default=0)
        if highest >= self._vocab_size:
            raise TransferMalformed(
                f"a sequence has token {highest}; the vocabulary has {self._vocab_size}"
            )
        self.states[self.sequence_idx] = trailer.state
        self.report = trailer.report
        if not trailer.state.token_ids:  # with generated tokens it is not used
            self.final_hidden = trailer.final_hidden

    def require_complete(self, *, between_transfers: bool) -> None:
        """Raise TransferDamaged unless all sequences arrived completely."""
        if self._left != 0 or not between_transfers:
            raise TransferDamaged(f"the fetch ended after {len(self.states)} whole sequences")
