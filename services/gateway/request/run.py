"""Base class of a prompt's run: state, statistics, deadline, and prefill with retries."""

import asyncio
import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.tracing import context_of, span
from services.gateway.metrics import GatewayMetrics
from services.gateway.request.generate_call import PromptRequest
from services.gateway.request.prefiller import Prefiller
from services.gateway.request.routing import Router
from services.gateway.request.states import NEXT, RUNS, WAITS_FOR, State
from services.gateway.usage import RunStats
from winnow.errors import (
    DeadlineExceeded,
    DeliveryFailed,
    PrefillFailed,
    PrefillLost,
    TransferRefused,
    UnknownReservation,
)
from winnow.model_files import ModelDescription
from winnow.tokens import PromptLogprobs, Token

logger = logging.getLogger(__name__)

# Ray replaces a lost prefill worker; until then calls fail.
_PREFILL_PATIENCE_S = 30.0
_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of the service that every run needs.

    silence_s: a generating decode worker that sends nothing for this long is lost.
    """

    router: Router
    prefiller: Prefiller
    model: ModelDescription
    prefill_attempts: int
    metrics: GatewayMetrics
    silence_s: float = 30.0


class Run(ABC):
    """Context manager for a prompt's run: on exit it frees what decode and prefill hold for it.

    deadline_s: in time.monotonic() seconds.
    """

    def __init__(self, request: PromptRequest, service: Service, deadline_s: float) -> None:
        self.request = request
        self.state = State.RECEIVED
        self.stats = RunStats()
        self._service = service
        self._arrived_s = time.monotonic()
        self._deadline_s = deadline_s
        self._prefill: asyncio.Task[PrefillOutcome] | None = None

    async def __aenter__(self) -> Self:
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
        await self._free()

    @abstractmethod
    async def admit(self) -> None:
        """Reserve what the prompt needs.  Raises as `open_generate_call`."""

    @abstractmethod
    def tokens(self) -> AsyncGenerator[list[Token]]:
        """Tokens of each engine step, after the prompt's prefill.

        Stop reading when every sequence has ended, then call `finish`.
        Raises the WinnowError that ended the run.
        """

    @abstractmethod
    async def finish(self) -> None:
        """Finish the run; every sequence must have ended, by itself or at a stop string."""

    @abstractmethod
    async def _free(self) -> None:
        """End what decode and prefill still do for the prompt."""

    @abstractmethod
    def _job(self, attempt: int, trace_context: str) -> PrefillJob:
        """The prefill job for the current state."""

    async def prompt_logprobs(self) -> PromptLogprobs:
        """Log-probabilities of the prompt's tokens, if requested; call it after prefill began."""
        assert self._prefill is not None
        logprobs = (await self._prefill).prompt_logprobs
        assert logprobs is not None
        return logprobs

    @property
    def is_long(self) -> bool:
        """As in PrefillJob."""
        request = self.request
        return self._service.model.is_long(len(request.token_ids) + request.sampling.max_tokens)

    def _scoring_job(self, attempt: int, trace_context: str) -> PrefillJob:
        """A job that computes only the prompt's log-probabilities."""
        return PrefillJob(
            request_id=self.request.request_id,
            attempt=attempt,
            token_ids=self.request.token_ids,
            pruning=self.request.pruning,
            kv_address=None,
            ticket=None,
            deadline_s=self._left_s(),
            trace_context=trace_context,
            admitted=self.stats.attempts > 1,
            num_prompt_logprobs=self.request.num_prompt_logprobs,
            explains=self.request.explains,
            adapter=self.request.adapter,
            is_long=self.is_long,
        )

    def _begin_prefill(self) -> None:
        self._enter(State.PREFILLING)
        self._prefill = asyncio.create_task(self._prefill_job())

    async def _prefill_job(self) -> PrefillOutcome:
        """Run prefill, with retries after failures that another worker may not have.

        A lost worker does not use up an attempt; retries after it end after _PREFILL_PATIENCE_S.
        """
        tries_left, give_up_s = self._service.prefill_attempts, math.inf
        for attempt in itertools.count(1):
            try:
                return await self._attempt(attempt)
            except DeliveryFailed:
                raise  # this decode worker cannot be reached: another prefill worker cannot help
            except PrefillLost as error:
                give_up_s = min(give_up_s, time.monotonic() + _PREFILL_PATIENCE_S)
                if self.state in RUNS or time.monotonic() > give_up_s:
                    raise
                self._warn("prefill attempt %d: %s", attempt, error)
                await asyncio.sleep(_PAUSE_S)
            except (PrefillFailed, TransferRefused) as error:
                tries_left -= 1
                if self.state in RUNS or isinstance(error, UnknownReservation) or not tries_left:
                    raise
                self._warn("prefill attempt %d failed, %d are left: %s", attempt, tries_left, error)
        raise AssertionError("attempts do not end")

    async def _attempt(self, attempt: int) -> PrefillOutcome:
        self.stats.attempts += 1
        with span("prefill", self.request.trace_context, attempt=attempt) as attempt_span:
            job = self._job(attempt, context_of(attempt_span))
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
        if state not in NEXT:
            self.stats.seconds = time.monotonic() - self._arrived_s
        logger.debug("%s", state, extra={"request_id": self.request.request_id})

    def _waiting(self, state: State, change: int) -> None:
        if state in WAITS_FOR:
            self._service.metrics.requests_waiting.labels(WAITS_FOR[state]).inc(change)
