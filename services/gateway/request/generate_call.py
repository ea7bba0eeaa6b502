"""One open Generate call: KV memory is reserved on a decode worker, tokens will follow."""

import asyncio
import logging
from dataclasses import dataclass

import grpc.aio

from services.common.messages import (
    adapter_to_proto,
    grammar_to_proto,
    recompression_to_proto,
    sampling_to_proto,
)
from services.common.registry import ADAPTERS, GRAMMAR, MIN_TOKENS, WorkerRecord
from services.common.rpc import error_from_rpc, is_typed
from services.common.tracing import metadata_of
from services.gateway.request.routing import Router, WorkerConnection
from winnow.adapters.ref import AdapterRef
from winnow.errors import (
    EngineFailed,
    InvalidSetting,
    ModelMismatch,
    NoDecodeWorker,
    Overloaded,
    RequestCancelled,
    TransferMismatch,
    WinnowError,
)
from winnow.grammar import Grammar
from winnow.grammar.threads import TIMEOUT_S
from winnow.model_files import ModelDescription
from winnow.pruning_settings import PruningSettings
from winnow.sampler_version import sampler_of
from winnow.sampling_params import SamplingParams
from winnow.v1 import decode_pb2 as pb
from winnow.wire import WIRE_VERSIONS, Grant

logger = logging.getLogger(__name__)

# Admission needs no compute, so a worker that takes longer than this counts as lost. A grammar is
# compiled before it.
_ADMISSION_TIMEOUT_S = 5.0
_ADAPTER_TIMEOUT_S = 30.0  # a worker may have to read it first
# Codes that gRPC itself sets; with any other code that is not Winnow's, the worker is lost.
_GRPCS_OWN = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
# Raised by `open_generate_call` if no worker takes the prompt. A prompt that was admitted before
# may be admitted again, when a worker comes back or has room.
NOBODY_TAKES_IT = (NoDecodeWorker, Overloaded, InvalidSetting)


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt of a request; its answers are sequences 0 to num_sequences - 1."""

    request_id: str
    token_ids: tuple[int, ...]
    num_sequences: int
    sampling: SamplingParams
    pruning: PruningSettings
    trace_context: str = ""  # a traceparent
    replayed: tuple[tuple[int, ...], ...] = ()  # as in GenerationSpec
    origin: pb.Origin | None = None  # where it is already running
    assured: bool = False  # as in GenerationSpec
    sampler_version: int | None = None  # of the worker that has sampled its tokens so far
    num_prompt_logprobs: int | None = None  # as in PrefillJob
    cache_salt: str = ""  # as in PrefillJob
    grammar: Grammar | None = None
    explains: bool = False  # as in PrefillJob
    adapter: AdapterRef | None = None  # as in PrefillJob

    def keeps_its_tokens_at(self, sampler_version: int) -> bool:
        """Whether a worker with that sampler goes on with the tokens that would have come."""
        is_sampled = self.sampling.temperature > 0 and self.sampler_version is not None
        return not is_sampled or sampler_version == self.sampler_version


class GenerateCall:
    """A prompt admitted by one worker. Always close it: that frees what it holds there."""

    def __init__(
        self,
        request_id: str,
        call: grpc.aio.UnaryStreamCall,
        connection: WorkerConnection,
        admitted: pb.Admitted,
    ) -> None:
        self.worker_id: str = admitted.worker_id
        self.kv_address: str = admitted.kv_address
        self.rank_kv_addresses = tuple(admitted.rank_kv_addresses)
        self.grant = grant_in(admitted)
        self.sampler_version = sampler_of(admitted.sampler_version)
        self._request_id = request_id
        self._peeked: pb.GenerateEvent | None = None
        self._call = call
        self._connection = connection
        connection.count_pages(admitted.reserved_pages)

    async def peek(self) -> None:
        """Wait for the next event and keep it for `next_event`.  Raises the same errors."""
        self._peeked = await self.next_event()

    async def next_event(self) -> pb.GenerateEvent | None:
        """The worker's next event; None at the end.  Raises the error that ended the call."""
        if self._peeked is not None:
            event, self._peeked = self._peeked, None
            return event
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _explained(error, f"decode worker {self.worker_id}") from error
        return None if event is grpc.aio.EOF else event

    @property
    def origin(self) -> pb.Origin:
        """Where another worker can fetch the prompt once it is running."""
        return pb.Origin(
            kv_address=self.kv_address,
            request_id=self._request_id,
            fetch_token=self.grant.fetch_token,
        )

    def suspect(self) -> None:
        """Note that the worker could not be reached, so that others are tried first."""
        self._connection.suspect()

    def close(self) -> None:
        """End the call; the worker frees the prompt's KV immediately."""
        self._call.cancel()
        self._connection.leave()


async def open_generate_call(
    router: Router, request: PromptRequest, model: ModelDescription, deadline_s: float
) -> GenerateCall:
    """Have the prompt admitted by the best worker with room for it.

    deadline_s: seconds until the call ends by itself.
    Raises Overloaded if no worker has room now, NoDecodeWorker if none answers, InvalidSetting if
    the prompt can never fit on any of them.
    """
    message = _to_proto(request, model)
    refusals: list[WinnowError] = []
    for worker in _able(await router.candidates(), request):
        try:
            return await _admit(router.enter(worker), message, deadline_s, request.trace_context)
        except (*NOBODY_TAKES_IT, EngineFailed, ModelMismatch, TransferMismatch) as error:
            is_usual = isinstance(error, Overloaded | InvalidSetting)
            level = logging.DEBUG if is_usual else logging.WARNING
            about = {"request_id": request.request_id}
            logger.log(level, "decode worker %s: %s", worker.worker_id, error, extra=about)
            refusals.append(error)
    raise _verdict(refusals)


def _able(workers: list[WorkerRecord], request: PromptRequest) -> list[WorkerRecord]:
    """The workers that support all the request needs.  Raises NoDecodeWorker if none does."""
    able = workers
    if request.sampling.min_tokens:
        able = [worker for worker in able if MIN_TOKENS in worker.features]
    if request.grammar is not None:
        able = [worker for worker in able if GRAMMAR in worker.features]
    if request.adapter is not None:
        able = [worker for worker in able if ADAPTERS in worker.features]
    if workers and not able:
        raise NoDecodeWorker(f"none of {len(workers)} decode workers can take the request")
    return _with_its_sampler(able, request)


def _with_its_sampler(workers: list[WorkerRecord], request: PromptRequest) -> list[WorkerRecord]:
    """The workers whose sampler gives the request's tokens, then the others.

    One that still runs elsewhere goes to no others: raises NoDecodeWorker if there are no more.
    """
    same = [one for one in workers if request.keeps_its_tokens_at(one.sampler_version)]
    if request.origin is None:
        return same + [one for one in workers if one not in same]
    if workers and not same:
        raise NoDecodeWorker(
            f"none of {len(workers)} decode workers has the request's sampler version, "
            f"{request.sampler_version}"
        )
    return same


def _verdict(refusals: list[WinnowError]) -> WinnowError:
    overloaded = [error for error in refusals if isinstance(error, Overloaded)]
    if overloaded:
        return overloaded[0]
    if refusals and all(isinstance(error, InvalidSetting) for error in refusals):
        return refusals[0]
    if refusals:
        return NoDecodeWorker(f"none of {len(refusals)} decode workers takes requests now")
    return NoDecodeWorker("no decode worker for this model is registered")


async def _admit(
    connection: WorkerConnection, message: pb.GenerateRequest, deadline_s: float, trace_context: str
) -> GenerateCall:
    metadata = metadata_of(trace_context)
    timeout_s = _ADMISSION_TIMEOUT_S + (TIMEOUT_S if message.HasField("grammar") else 0)
    timeout_s += _ADAPTER_TIMEOUT_S if message.HasField("adapter") else 0
    call = connection.stub.Generate(message, timeout=deadline_s, metadata=metadata)
    try:
        return GenerateCall(
            message.request_id, call, connection, await _read_admitted(call, timeout_s)
        )
    except BaseException as error:
        call.cancel()
        connection.leave()
        if isinstance(error, NoDecodeWorker):
            connection.suspect()
        raise


async def _read_admitted(call: grpc.aio.UnaryStreamCall, timeout_s: float) -> pb.Admitted:
    try:
        async with asyncio.timeout(timeout_s):
            event = await call.read()
    except grpc.aio.AioRpcError as error:
        raise _explained(error, "it") from error
    except TimeoutError as error:
        raise NoDecodeWorker(f"no answer within {timeout_s:g} seconds") from error
    if event is grpc.aio.EOF or not event.HasField("admitted"):
        raise NoDecodeWorker("the worker does not speak winnow.v1.Decode")
    admitted: pb.Admitted = event.admitted
    return admitted


def _explained(error: grpc.aio.AioRpcError, who: str) -> WinnowError:
    """The worker's own error; NoDecodeWorker if the call broke off without one."""
    told = error_from_rpc(error)
    is_told = is_typed(error) or error.code() in _GRPCS_OWN
    if is_told and not isinstance(told, RequestCancelled):
        return told
    return NoDecodeWorker(f"{who} went away: {told.message}")


def grant_in(admitted: pb.Admitted) -> Grant:
    """The grant in a worker's Admitted event."""
    return Grant(admitted.wire_version, admitted.transfer_secret)


def _to_proto(request: PromptRequest, model: ModelDescription) -> pb.GenerateRequest:
    num_tokens, num_kv_heads = len(request.token_ids), model.shape.num_kv_heads
    return pb.GenerateRequest(
        request_id=request.request_id,
        model_fingerprint=model.fingerprint,
        num_prompt_tokens=num_tokens,
        num_sequences=request.num_sequences,
        max_prompt_entries=request.pruning.max_prompt_entries(num_tokens, num_kv_heads),
        sampling=sampling_to_proto(request.sampling),
        recompression=recompression_to_proto(request.pruning.decode_side),
        prompt_token_ids=request.token_ids if request.sampling.needs_prompt else (),
        wire_versions=WIRE_VERSIONS,
        replayed=[pb.ReplayedTokens(token_ids=token_ids) for token_ids in request.replayed],
        origin=request.origin,
        assured=request.assured,
        sampler_version=request.sampler_version or 0,
        grammar=None if request.grammar is None else grammar_to_proto(request.grammar),
        adapter=None if request.adapter is None else adapter_to_proto(request.adapter),
    )
