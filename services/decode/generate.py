"""The Decode service: admits requests, streams their tokens, reports the worker's status."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from grpc.aio import ServicerContext

from services.common.messages import (
    adapter_from_proto,
    grammar_from_proto,
    report_to_proto,
    tokens_to_proto,
)
from services.common.rpc import abort_aio
from services.common.tracing import Span, context_in, span
from services.decode.active_request import ActiveRequest, Event, KVArrived, Move
from services.decode.admission import Admission
from services.decode.metrics import DecodeMetrics
from services.decode.spec import spec_from_request
from services.decode.take_over import Fetcher
from winnow.adapters.slots import LoadedAdapter
from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.outputs import StepOutput
from winnow.errors import (
    EngineFailed,
    InvalidGrammar,
    LeaseExpired,
    ModelMismatch,
    WinnowError,
)
from winnow.grammar.compiler import GrammarCompiler
from winnow.grammar.constraint import CompiledGrammar
from winnow.sampler_version import SAMPLER_VERSION, require_same_sampler
from winnow.v1 import decode_pb2 as pb
from winnow.v1.decode_pb2_grpc import DecodeServicer
from winnow.wire import WIRE_VERSIONS, Grant

logger = logging.getLogger(__name__)

# Drain answers this long before the caller's deadline, so that the answer still arrives.
_ANSWER_MARGIN_S = 0.25


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """The worker's identity. kv_address: host:port of KvTransfer; lease_s: seconds without any KV.

    sign_of_life_s: interval of keepalive events while a request receives KV or waits for memory.
    rank_kv_addresses: those of all ranks, if each receives the KV of its heads.
    """

    worker_id: str
    kv_address: str
    lease_s: float
    sign_of_life_s: float
    rank_kv_addresses: tuple[str, ...] = ()


class GenerateServicer(DecodeServicer):
    """Serves Decode.  drain: drains the worker; open_transfers: the number of open pushes.

    grammars: None if this worker cannot take requests with a grammar.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        engine: DecodeEngine,
        admission: Admission,
        metrics: DecodeMetrics,
        fetcher: Fetcher,
        drain: Callable[[float], Awaitable[int]],
        open_transfers: Callable[[], int],
        default_drain_s: float,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._fetcher = fetcher
        self._drain = drain
        self._open_transfers = open_transfers
        self._default_drain_s = default_drain_s
        self._grammars = grammars

    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> None:
        """Ends with OK after the last token, or with one typed error; always frees everything."""
        parent = context_in(context.invocation_metadata())
        try:
            with span("decode", parent, is_server=True, prompt=request.request_id) as own:
                await self._generate(request, context, own)
        except WinnowError as error:
            logger.info("failed: %s", error, extra={"request_id": request.request_id})
            await abort_aio(context, error)
        except Exception as error:
            logger.exception("Generate broke", extra={"request_id": request.request_id})
            await abort_aio(context, EngineFailed(f"the decode worker broke: {error}"))

    async def _generate(
        self, message: pb.GenerateRequest, context: ServicerContext, own: Span
    ) -> None:
        self._require_model(message.model_fingerprint)
        spec = spec_from_request(message, self._engine.model.vocab_size)
        if message.HasField("origin"):
            require_same_sampler(spec.sampling, message.sampler_version)
        if message.HasField("grammar"):
            spec = replace(spec, grammar=await self._compiled(message.grammar))
        async with self._adapter(message) as adapter:
            await self._run(replace(spec, adapter=adapter), message, context, own)
        logger.info("finished", extra={"request_id": message.request_id})

    async def _run(
        self, spec: GenerationSpec, message: pb.GenerateRequest, context: ServicerContext, own: Span
    ) -> None:
        """Admit the request and stream its tokens; its pages are free when it ends."""
        request = await self._admission.admit(spec, Grant.issue(message.wire_versions))
        try:
            own.add_event("admitted")
            await context.write(pb.GenerateEvent(admitted=self._admitted(request)))
            if message.HasField("origin"):
                self._fetcher.begin(request, message.origin)
            arrived = await self._next_before_lease_ends(request, context)
            own.add_event("KV in place")
            await context.write(_event_to_proto(arrived))
            if self._admission.draining:
                request.should_move()
            await _stream_tokens(request, context, self._identity.sign_of_life_s)
        finally:
            self._admission.remove(request)

    def _require_model(self, asked: str) -> None:
        fingerprint = self._engine.model.fingerprint
        if asked != fingerprint:
            raise ModelMismatch(f"the request is for model {asked}; this worker has {fingerprint}")

    @asynccontextmanager
    async def _adapter(self, message: pb.GenerateRequest) -> AsyncIterator[LoadedAdapter | None]:
        """Context manager: the request's adapter, which stays in its slot meanwhile."""
        if not message.HasField("adapter"):
            yield None
            return
        used = await self._used(message.adapter)
        try:
            yield used
        finally:
            used.end_use()

    async def _used(self, message: pb.Adapter) -> LoadedAdapter:
        adapters, ref = self._engine.model.adapters, adapter_from_proto(message)
        if adapters is None:
            raise ModelMismatch(
                f"this worker has no room for adapter {ref.name}: max_adapters is 0"
            )
        return await asyncio.to_thread(adapters.use, ref)

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: ServicerContext
    ) -> pb.LoadAdapterResponse:
        try:
            self._require_model(request.model_fingerprint)
            (await self._used(request.adapter)).end_use()
        except WinnowError as error:
            logger.warning("adapter %s: %s", request.adapter.name, error)
            await abort_aio(context, error)
        return pb.LoadAdapterResponse()

    async def _compiled(self, message: pb.Grammar) -> CompiledGrammar:
        if self._grammars is None:
            raise InvalidGrammar("this worker has no tokenizer, which grammars need")
        return await asyncio.to_thread(self._grammars.compile, grammar_from_proto(message))

    def _admitted(self, request: ActiveRequest) -> pb.Admitted:
        identity = self._identity
        return pb.Admitted(
            worker_id=identity.worker_id,
            kv_address=identity.kv_address,
            lease_s=identity.lease_s,
            reserved_pages=request.reservation.num_pages,
            wire_version=request.grant.wire_version,
            transfer_secret=request.grant.secret,
            sampler_version=SAMPLER_VERSION,
            rank_kv_addresses=identity.rank_kv_addresses,
        )

    async def _next_before_lease_ends(
        self, request: ActiveRequest, context: ServicerContext
    ) -> Event:
        """The request's first event.  Raises LeaseExpired if no KV arrives within the lease."""
        lease_s, seen_s = self._identity.lease_s, request.last_sign_s
        while (left_s := request.lease_left_s(lease_s)) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, self._identity.sign_of_life_s)):
                    return await request.events.get()
            if request.last_sign_s != seen_s:
                seen_s = request.last_sign_s
                await context.write(pb.GenerateEvent(waiting=pb.Waiting()))
        self._metrics.lease_expiries.inc()
        raise LeaseExpired(
            f"no KV came for {lease_s:g} seconds; the reservation of request "
            f"{request.spec.request_id} is freed"
        )

    async def Status(
        self, request: pb.StatusRequest, context: ServicerContext
    ) -> pb.StatusResponse:
        """What the worker currently holds."""
        stats = self._engine.stats()
        return pb.StatusResponse(
            worker_id=self._identity.worker_id,
            model_fingerprint=self._engine.model.fingerprint,
            wire_versions=WIRE_VERSIONS,
            draining=self._admission.draining,
            running_sequences=stats.running_sequences,
            reserved_requests=stats.reserved_requests,
            pages_total=stats.pool.pages_total,
            pages_used=stats.pool.pages_used,
            pages_reserved=stats.pool.pages_reserved,
            page_size=stats.pool.page_size,
            kv_bytes_used=stats.pool.kv_bytes_used,
            open_transfers=self._open_transfers(),
            swapped_sequences=stats.swapped_sequences,
        )

    async def Drain(self, request: pb.DrainRequest, context: ServicerContext) -> pb.DrainResponse:
        """Answers when no request is left, or just before the call's deadline."""
        left_s = context.time_remaining()
        timeout_s = self._default_drain_s if left_s is None else max(0, left_s - _ANSWER_MARGIN_S)
        return pb.DrainResponse(remaining_requests=await self._drain(timeout_s))


async def _stream_tokens(
    request: ActiveRequest, context: ServicerContext, sign_of_life_s: float
) -> None:
    """Write each step's tokens until the last sequence has ended; raises the engine's error."""
    while True:
        try:
            async with asyncio.timeout(sign_of_life_s):
                event = await request.events.get()
        except TimeoutError:
            if request.reservation.waits_for_memory:
                await context.write(pb.GenerateEvent(waiting=pb.Waiting()))
            continue
        if event is Move.OVER:
            return
        await context.write(_event_to_proto(event))
        if isinstance(event, StepOutput) and event.finished:
            return


def _event_to_proto(event: Event) -> pb.GenerateEvent:
    """Raises the event if it is, or contains, an error."""
    match event:
        case WinnowError():
            raise event
        case KVArrived(attempt, report):
            prefilled = pb.Prefilled(attempt=attempt, report=report_to_proto(report))
            return pb.GenerateEvent(prefilled=prefilled)
        case Move.DUE:
            return pb.GenerateEvent(leaving=pb.Leaving())
        case Move.BEGUN:
            return pb.GenerateEvent(moved=pb.Moved())
    assert isinstance(event, StepOutput)
    if event.error is not None:
        raise event.error
    return pb.GenerateEvent(tokens=tokens_to_proto(event.tokens, event.recompressed_entries))
