"""One prompt's life in the gateway, from the reservation of KV memory to its last token.

A prompt whose decode worker is lost goes on at another one: that one gets the prompt's KV anew, and
replays the tokens that were generated. A prompt whose worker drains moves to another one, which
fetches all that the first one holds. Either way the answer is the one that it would have been.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from services.common.messages import report_from_proto, tokens_from_proto
from services.common.tasks import end
from services.common.tracing import context_of, span
from services.gateway.calls import Calls
from services.gateway.generation import NOBODY_TAKES_IT, WORKER_LOST, PromptRequest
from services.gateway.metrics import GatewayMetrics
from services.gateway.prefiller import Prefiller
from services.gateway.routing import Router
from services.gateway.states import NEXT, WAITS_FOR, State
from winnow.errors import (
    DeadlineExceeded,
    DeliveryFailed,
    EngineFailed,
    NoDecodeWorker,
    NotFinite,
    Preempted,
    PrefillFailed,
    PrefillLost,
    TransferRefused,
    UnknownReservation,
    WinnowError,
)
from winnow.model_files import ModelDescription
from winnow.request import PrefillJob, PrefillOutcome, PrefillReport, PrefillTimings, Token
from winnow.v1 import decode_pb2 as pb

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


# What prefill and decode tell after the last token is worth this wait, not more.
_LAST_WORDS_TIMEOUT_S = 2.0
MAX_MIGRATIONS = 3
_RUNS = (State.DECODING, State.MOVING)  # the worker has had all it needs
# Ray starts another prefill worker in place of a lost one; calls meet the loss until it has.
_PREFILL_PATIENCE_S = 30.0
# A worker that takes over is sought for this long after a loss: the lost one may be back by then.
_PATIENCE_S = 30.0
_PAUSE_S = 0.25


@dataclass(slots=True)
class Figures:
    """What became of a prompt so far.

    attempts: prefills. migrations: times that another decode worker had to compute it anew.
    moves: times that another one fetched it.
    ttft_s: from its arrival to its first token. timings: None if the prefill worker delivered the
    KV but did not tell.
    """

    attempts: int = 0
    migrations: int = 0
    moves: int = 0
    ttft_s: float | None = None
    report: PrefillReport | None = None
    timings: PrefillTimings | None = None
    recompressed_entries: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """What every prompt's life needs of the service.

    silence_s: a decode worker that generates, and says nothing for this long, is lost.
    """

    router: Router
    prefiller: Prefiller
    model: ModelDescription
    prefill_attempts: int
    metrics: GatewayMetrics
    silence_s: float = 30.0


class PromptRun:
    """Use it as a context: leaving it frees whatever decode and prefill still hold for it.

    deadline_s: on the clock of time.monotonic.
    """

    def __init__(self, request: PromptRequest, service: Service, deadline_s: float) -> None:
        self.request = request
        self.state = State.RECEIVED
        self.figures = Figures()
        self._service = service
        self._arrived_s = time.monotonic()
        self._deadline_s = deadline_s
        self._asked = request  # of the worker: anew at each
        self._generated: list[list[int]] = [[] for _ in range(request.num_sequences)]
        self._calls = self._no_calls()
        self._stopped_s = 0.0  # when its worker began to give it away
        self._prefill: asyncio.Task[PrefillOutcome] | None = None
        self._ended: set[int] = set()
        self._read: asyncio.Task[pb.GenerateEvent | None] | None = None

    async def __aenter__(self) -> "PromptRun":
        self._waiting(self.state, 1)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.state is not State.FINISHED:
            self._enter(State.FAILED if isinstance(error, Exception) else State.CANCELLED)
        await self._leave_worker()

    async def _leave_worker(self) -> None:
        """Frees what decode and prefill hold for the prompt."""
        tasks = [task for task in (self._read, self._prefill) if task is not None]
        for task in tasks:
            task.cancel()
        await self._calls.close()
        await end(*tasks)

    def _no_calls(self) -> Calls:
        return Calls(self._service.router, self._service.model, self._left_s)

    async def admit(self) -> None:
        """Reserve KV memory for the prompt; raises as `open_generation`."""
        with span("admission", self.request.trace_context, prompt=self.request.request_id):
            await self._calls.admit(self.request)
        self._enter(State.ADMITTED)
        self._service.metrics.requests_admitted.inc()
        self._service.metrics.admission_seconds.observe(time.monotonic() - self._arrived_s)

    async def tokens(self) -> AsyncGenerator[list[Token]]:
        """What each engine step gave, after the prompt's prefill.

        Stop reading when every sequence has ended, then call `finish`.
        Raises the WinnowError that ended the run.
        """
        self._begin_prefill()
        while True:
            try:
                event = await self._next_event()
                if event.HasField("moved"):
                    await self._follow()
            except WORKER_LOST as error:
                await self._recover(error)
                continue
            if event.HasField("prefilled"):
                self._note_arrival(event.prefilled)
            elif event.HasField("leaving"):
                self._calls.begin_move(replace(self._asked, replayed=self._replayed()))
            elif event.HasField("tokens"):
                yield self._note(event.tokens)

    def _note_arrival(self, prefilled: pb.Prefilled) -> None:
        if self.state is State.MOVING:
            self._calls.end_move()
            self.figures.moves += 1
            self._service.metrics.move_seconds.observe(time.monotonic() - self._stopped_s)
        self.figures.report = report_from_proto(prefilled.report)
        self._enter(State.DECODING)

    async def _follow(self) -> None:
        self._stopped_s = time.monotonic()
        self._enter(State.MOVING)
        await self._soon(self._calls.follow_move())

    def _begin_prefill(self) -> None:
        self._enter(State.PREFILLING)
        self._prefill = asyncio.create_task(self._prefill_job())

    async def _recover(self, error: WinnowError) -> None:
        """Goes on at another worker.  Raises `error` where that would not help, or not again."""
        figures = self.figures
        if isinstance(error, NotFinite) or figures.migrations == MAX_MIGRATIONS:
            raise error
        figures.migrations += 1
        self._service.metrics.migrations.labels(error.code).inc()
        num_generated = sum(map(len, self._generated))
        self._warn("after %d tokens: %s; another worker takes over", num_generated, error)
        self._enter(State.LOST)
        is_lost = not isinstance(error, Preempted)
        if is_lost:
            self._calls.current.suspect()
        await self._leave_worker()
        self._calls = self._no_calls()
        self._asked = replace(
            self.request,
            request_id=f"{self.request.request_id}.{figures.migrations}",
            replayed=self._replayed(),
            assured=self._asked.assured or not is_lost,
        )
        try:
            await self._calls.admit_elsewhere(self._asked, _PATIENCE_S if is_lost else math.inf)
        except NOBODY_TAKES_IT as none:
            raise NoDecodeWorker(f"{error.message}; nobody took over: {none.message}") from none
        self._begin_prefill()

    def _replayed(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self._generated)) if any(self._generated) else ()

    async def finish(self) -> None:
        """Every sequence has ended, by itself or at a stop string."""
        assert self._prefill is not None
        outcome = await self._last_words(self._prefill, "prefill delivered the KV")
        if outcome is not None:
            self.figures.timings = outcome.timings
        if len(self._ended) == self.request.num_sequences:
            # The call's end, so that it is not cancelled.
            await self._last_words(self._calls.current.next_event(), "decode gave all tokens")
        self._enter(State.FINISHED)

    async def _last_words(self, words: Awaitable[_T], done: str) -> _T | None:
        """What a worker tells when the answer is whole; None where it fails or is silent."""
        try:
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                return await words
        except (WinnowError, TimeoutError) as error:
            self._warn("%s, but then failed: %r", done, error)
        return None

    def _note(self, tokens: pb.Tokens) -> list[Token]:
        if self.figures.ttft_s is None:
            self.figures.ttft_s = time.monotonic() - self._arrived_s
        self.figures.recompressed_entries = tokens.recompressed_entries
        step = tokens_from_proto(tokens)
        for token in step:
            self._generated[token.sequence_idx].append(token.token_id)
        self._ended |= {token.sequence_idx for token in step if token.finish_reason}
        return step

    async def _next_event(self) -> pb.GenerateEvent:
        """The worker's next event, or the failure of prefill if that is earlier."""
        event = await (self._step() if self.state in _RUNS else self._prefilled())
        if event is None:
            raise EngineFailed("the decode worker ended its answer before the last token")
        return event

    async def _step(self) -> pb.GenerateEvent | None:
        return await self._soon(self._calls.current.next_event())

    async def _soon(self, event: Awaitable[_T]) -> _T:
        """The event, of a worker that has all it needs; raises NoDecodeWorker if it is silent."""
        silence_s = self._service.silence_s
        try:
            async with asyncio.timeout(silence_s):
                return await event
        except TimeoutError as error:
            raise NoDecodeWorker(
                f"decode worker {self._calls.current.worker_id} said nothing for {silence_s:g} s"
            ) from error

    async def _prefilled(self) -> pb.GenerateEvent | None:
        assert self._prefill is not None
        self._read = asyncio.create_task(self._calls.current.next_event())
        await asyncio.wait({self._read, self._prefill}, return_when=asyncio.FIRST_COMPLETED)
        if not self._read.done():
            self._prefill.result()
        return await self._soon(self._read)

    async def _prefill_job(self) -> PrefillOutcome:
        """Prefill, tried again on a failure that another worker may not have.

        A worker that is lost costs no try, but _PREFILL_PATIENCE_S at most.
        """
        tries_left, give_up_s = self._service.prefill_attempts, math.inf
        for attempt in itertools.count(1):
            try:
                return await self._attempt(attempt)
            except DeliveryFailed:
                raise  # at this decode worker, another prefill worker does no better
            except PrefillLost as error:
                give_up_s = min(give_up_s, time.monotonic() + _PREFILL_PATIENCE_S)
                if self.state in _RUNS or time.monotonic() > give_up_s:
                    raise
                self._warn("prefill attempt %d: %s", attempt, error)
                await asyncio.sleep(_PAUSE_S)
            except (PrefillFailed, TransferRefused) as error:
                tries_left -= 1
                if self.state in _RUNS or isinstance(error, UnknownReservation) or not tries_left:
                    raise
                self._warn("prefill attempt %d failed, %d are left: %s", attempt, tries_left, error)
        raise AssertionError("attempts do not end")

    async def _attempt(self, attempt: int) -> PrefillOutcome:
        self.figures.attempts += 1
        with span("prefill", self.request.trace_context, attempt=attempt) as attempt_span:
            job = PrefillJob(
                request_id=self._asked.request_id,
                attempt=attempt,
                token_ids=self.request.token_ids,
                pruning=self.request.pruning,
                kv_address=self._calls.current.kv_address,
                ticket=self._calls.current.grant.ticket(attempt),
                deadline_s=self._left_s(),
                trace_context=context_of(attempt_span),
                admitted=self.figures.attempts > 1,
            )
            return await self._service.prefiller.prefill(job)

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the request did not end in its time")
        return left_s

    def _warn(self, message: str, *values: object) -> None:
        logger.warning(message, *values, extra={"request_id": self.request.request_id})

    def _enter(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.state} -> {state}"
        self._waiting(self.state, -1)
        self._waiting(state, 1)
        self.state = state
        logger.debug("%s", state, extra={"request_id": self.request.request_id})

    def _waiting(self, state: State, change: int) -> None:
        if state in WAITS_FOR:
            self._service.metrics.requests_waiting.labels(WAITS_FOR[state]).inc(change)
