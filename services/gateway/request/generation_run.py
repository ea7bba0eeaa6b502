"""One prompt in the gateway, from the reservation of KV memory to its last token.

If a prompt's decode worker is lost, another worker receives the prompt's KV from a new prefill and
replays the generated tokens. If its worker drains, another worker fetches its state from the first
one. Either way the answer does not change.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import replace
from typing import TypeVar

from services.common.jobs import PrefillJob
from services.common.messages import report_from_proto, tokens_from_proto
from services.common.tasks import end
from services.common.tracing import span
from services.gateway.request.decode_calls import DecodeCalls
from services.gateway.request.generate_call import NOBODY_TAKES_IT, PromptRequest
from services.gateway.request.run import Run, Service
from services.gateway.request.states import RUNS, WORKER_LOST, State
from winnow.errors import (
    EngineFailed,
    NoDecodeWorker,
    NotFinite,
    Preempted,
    PrefillFailed,
    TransferRefused,
    WinnowError,
)
from winnow.tokens import PromptLogprobs, Token
from winnow.v1 import decode_pb2 as pb

_T = TypeVar("_T")


# Maximum wait for what prefill and decode report after the last token.
_LAST_WORDS_TIMEOUT_S = 2.0
MAX_MIGRATIONS = 3
# After a loss, how long to look for another worker: the lost one may be back by then.
_PATIENCE_S = 30.0


class PromptRun(Run):
    """A prompt for which tokens are generated."""

    def __init__(self, request: PromptRequest, service: Service, deadline_s: float) -> None:
        super().__init__(request, service, deadline_s)
        self._asked = request  # as sent to the current decode worker
        self._generated: list[list[int]] = [[] for _ in range(request.num_sequences)]
        self._calls = self._no_calls()
        self._stopped_s = 0.0  # when its worker stopped, to be fetched from
        self._ended: set[int] = set()
        self._read: asyncio.Task[pb.GenerateEvent | None] | None = None
        self._logprobs: PromptLogprobs | None = None

    def answer(self, sequence_idx: int) -> list[int]:
        """The tokens that were generated of one sequence, maybe some after its stop string."""
        return self._generated[sequence_idx]

    async def _free(self) -> None:
        tasks = [task for task in (self._read, self._prefill) if task is not None]
        for task in tasks:
            task.cancel()
        await self._calls.close()
        await end(*tasks)

    def _no_calls(self) -> DecodeCalls:
        return DecodeCalls(self._service.router, self._service.model, self._left_s)

    async def admit(self) -> None:
        with span("admission", self.request.trace_context, prompt=self.request.request_id):
            await self._calls.admit(self.request)
        self._enter(State.ADMITTED)
        self._service.metrics.requests_admitted.inc()
        self.stats.admission_s = time.monotonic() - self._arrived_s
        self._service.metrics.admission_seconds.observe(self.stats.admission_s)

    async def tokens(self) -> AsyncGenerator[list[Token]]:
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
            self.stats.moves += 1
            self._service.metrics.move_seconds.observe(time.monotonic() - self._stopped_s)
        self.stats.report = report_from_proto(prefilled.report)
        self._enter(State.DECODING)

    async def _follow(self) -> None:
        self._stopped_s = time.monotonic()
        self._enter(State.MOVING)
        await self._soon(self._calls.follow_move())

    async def prompt_logprobs(self) -> PromptLogprobs:
        """Kept, so that prefill for a later worker does not compute them again."""
        if self._logprobs is None:
            self._logprobs = await self._told_logprobs()
        return self._logprobs

    async def _told_logprobs(self) -> PromptLogprobs:
        """From prefill; recomputed without KV if prefill was lost after the KV had arrived."""
        try:
            return await super().prompt_logprobs()
        except (PrefillFailed, TransferRefused) as error:
            self._warn("the prompt's log-probabilities are lost: %s", error)
        self._prefill = asyncio.create_task(self._prefill_job())
        return await super().prompt_logprobs()

    async def _recover(self, error: WinnowError) -> None:
        """Continue on another worker.  Raises `error` if that cannot help or was done too often."""
        stats = self.stats
        if isinstance(error, NotFinite) or stats.migrations == MAX_MIGRATIONS:
            raise error
        stats.migrations += 1
        self._service.metrics.migrations.labels(error.code).inc()
        num_generated = sum(map(len, self._generated))
        self._warn("after %d tokens: %s; another worker takes over", num_generated, error)
        self._enter(State.LOST)
        is_lost = not isinstance(error, Preempted)
        if is_lost:
            self._calls.current.suspect()
        sampler_version = self._calls.current.sampler_version if num_generated else None
        await self._free()
        self._calls = self._no_calls()
        self._asked = replace(
            self.request,
            request_id=f"{self.request.request_id}.{stats.migrations}",
            replayed=self._replayed(),
            assured=self._asked.assured or not is_lost,
            sampler_version=sampler_version,
        )
        try:
            await self._calls.admit_elsewhere(self._asked, _PATIENCE_S if is_lost else math.inf)
        except NOBODY_TAKES_IT as none:
            raise NoDecodeWorker(f"{error.message}; nobody took over: {none.message}") from none
        if not self._asked.keeps_its_tokens_at(self._calls.current.sampler_version):
            self._warn(
                "sampler version %d goes on where %d began: a valid answer, but not the seed's",
                self._calls.current.sampler_version,
                sampler_version,
            )
        self._begin_prefill()

    def _replayed(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self._generated)) if any(self._generated) else ()

    async def finish(self) -> None:
        assert self._prefill is not None
        outcome = await self._last_words(self._prefill, "prefill delivered the KV")
        if outcome is not None:
            self.stats.timings, self.stats.scores = outcome.timings, outcome.scores
        if len(self._ended) == self.request.num_sequences:
            # Read the end of the call, so that it is not cancelled.
            await self._last_words(self._calls.current.next_event(), "decode gave all tokens")
        self._enter(State.FINISHED)

    async def _last_words(self, words: Awaitable[_T], done: str) -> _T | None:
        """A worker's last report after the answer is complete; None on failure or timeout."""
        try:
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                return await words
        except (WinnowError, TimeoutError) as error:
            self._warn("%s, but then failed: %r", done, error)
        return None

    def _note(self, tokens: pb.Tokens) -> list[Token]:
        step = tokens_from_proto(tokens)
        self.stats.last_token_s = time.monotonic() - self._arrived_s
        if self.stats.ttft_s is None:
            self.stats.ttft_s = self.stats.last_token_s
            self.stats.first_logprobs = step[0].logprobs
        self.stats.recompressed_entries = tokens.recompressed_entries
        for token in step:
            self._generated[token.sequence_idx].append(token.token_id)
        self._ended |= {token.sequence_idx for token in step if token.finish_reason}
        return step

    async def _next_event(self) -> pb.GenerateEvent:
        """The worker's next event, or prefill's error if that comes first."""
        event = await (self._step() if self.state in RUNS else self._prefilled())
        if event is None:
            raise EngineFailed("the decode worker ended its answer before the last token")
        return event

    async def _step(self) -> pb.GenerateEvent | None:
        return await self._soon(self._calls.current.next_event())

    async def _soon(self, event: Awaitable[_T]) -> _T:
        """An event of a worker that has all it needs.  Raises NoDecodeWorker if it is silent."""
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

    def _job(self, attempt: int, trace_context: str) -> PrefillJob:
        request, call = self.request, self._calls.current
        if self.state in RUNS and request.num_prompt_logprobs is not None:
            return self._scoring_job(attempt, trace_context)
        return PrefillJob(
            request_id=self._asked.request_id,
            attempt=attempt,
            token_ids=request.token_ids,
            pruning=request.pruning,
            kv_address=call.kv_address,
            ticket=call.grant.ticket(attempt),
            deadline_s=self._left_s(),
            trace_context=trace_context,
            admitted=self.stats.attempts > 1,
            num_prompt_logprobs=None if self._logprobs else request.num_prompt_logprobs,
            cache_salt=request.cache_salt,
            rank_kv_addresses=call.rank_kv_addresses,
            explains=request.explains,
            adapter=request.adapter,
            is_long=self.is_long,
        )
