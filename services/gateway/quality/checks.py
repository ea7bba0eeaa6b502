"""A share of pruned requests, computed unpruned too while no request runs."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from services.common.settings import Settings
from services.common.tasks import end, note_error
from services.gateway.metrics import OTHER_TASK, GatewayMetrics
from services.gateway.quality.check import Agreement, QualityCheck
from services.gateway.request.prefiller import Prefiller
from services.gateway.request.request import GenerationRequest
from services.gateway.request.running_request import RunningRequest
from services.gateway.served_model import ServedModel
from winnow.errors import Overloaded, WinnowError

logger = logging.getLogger(__name__)

MAX_WAITING = 64
# Between the requests of one busy client, starting would be in vain.
_QUIET_S = 0.5
# A prefill worker that computes other gateways' prompts is asked again after this.
_AGAIN_S = 1.0


class QualityChecks:
    """Where sampled answers wait for an idle moment. Belongs to one event loop.

    One check runs at a time, and only while this gateway runs no request: one that arrives stops
    it, and it is begun anew later. Of more than MAX_WAITING the oldest are dropped.
    """

    def __init__(
        self, settings: Settings, prefiller: Prefiller, model: ServedModel, metrics: GatewayMetrics
    ) -> None:
        self._share = settings.quality_sample
        self._tasks = frozenset(settings.quality_tasks)
        self._timeout_s = settings.request_timeout_s
        self._prefiller = prefiller
        self._model = model.description
        self._metrics = metrics
        self._num_requests = 0
        self._waiting: deque[QualityCheck] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    def sampled(self, request: GenerationRequest) -> GenerationRequest:
        """The request, marked if its answers are to be checked.

        What a grammar leaves of the tokens is not what the model itself would have said.
        """
        pruning = request.pruning
        may_prune = pruning.method != "full" or pruning.decode_side.observes
        is_free = request.verified_by is None and request.grammar is None
        if not (is_free and may_prune) or random.random() >= self._share:
            return request
        return replace(request, is_sampled=True)

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """A block in which a request runs."""
        self._num_requests += 1
        if self._worker is not None:
            self._worker.cancel()
        try:
            yield
        finally:
            self._num_requests -= 1
            if self._waiting and not self._num_requests:
                self._worker = asyncio.create_task(self._work(self._worker))
                self._worker.add_done_callback(note_error)

    def add(self, running: RunningRequest) -> None:
        """Has the answers of a request that has ended wait for their checks, if it is marked."""
        if self._closed or not running.request.is_sampled:
            return
        for prompt_idx in range(len(running.runs)):
            check = QualityCheck.of(running, prompt_idx)
            if check is not None and self._fits(check):
                self._waiting.append(check)
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._metrics.quality_checks.labels("dropped").inc()

    def _fits(self, check: QualityCheck) -> bool:
        """Whether prompt and answer leave a prefill the one position that it does not take."""
        return len(check.token_ids) + len(check.answer) < self._model.max_positions

    async def close(self) -> None:
        """Ends what runs; what waits is dropped."""
        self._closed = True
        if self._worker is not None:
            await end(self._worker)
        self._metrics.quality_checks.labels("dropped").inc(len(self._waiting))
        self._waiting.clear()

    async def _work(self, before: asyncio.Task[None] | None) -> None:
        """Runs what waits; cancelled as soon as a request arrives."""
        if before is not None:
            await end(before)
        await asyncio.sleep(_QUIET_S)
        while self._waiting:
            if await self._run(self._waiting[0]):
                self._waiting.popleft()
            else:
                await asyncio.sleep(_AGAIN_S)

    async def _run(self, check: QualityCheck) -> bool:
        """Whether the check is over; otherwise it has to be run again."""
        about = {"request_id": check.request_id}
        try:
            outcome = await self._prefiller.prefill(check.job(self._timeout_s))
            assert outcome.prompt_logprobs is not None
            found = check.agreement(outcome.prompt_logprobs, self._model.eos_token_ids)
        except Overloaded:
            return False
        except WinnowError as error:
            self._metrics.quality_checks.labels("failed").inc()
            logger.warning("its quality could not be checked: %s", error, extra=about)
        except Exception:  # it must not end the checks after it
            self._metrics.quality_checks.labels("failed").inc()
            logger.exception("the check of its quality broke", extra=about)
        else:
            self._count(found, check.task if check.task in self._tasks else OTHER_TASK)
            logger.info("checked: %s", _told(found), extra=about)
        return True

    def _count(self, found: Agreement, task: str | None) -> None:
        metrics = self._metrics
        metrics.quality_checks.labels("done").inc()
        metrics.quality_first_tokens.labels(task).inc()
        metrics.quality_first_tokens_agreed.labels(task).inc(found.first_token)
        metrics.quality_first_kl.labels(task).observe(found.first_kl)
        if found.num_agreeing is not None:
            metrics.quality_answers.labels(task).inc()
            metrics.quality_answers_agreed.labels(task).inc(found.num_agreeing == found.num_tokens)
            metrics.quality_tokens_agreed.labels(task).observe(
                found.num_agreeing / found.num_tokens
            )


def _told(found: Agreement) -> str:
    first = "the same" if found.first_token else "another"
    tokens = "not greedy"
    if found.num_agreeing is not None:
        tokens = f"{found.num_agreeing} of {found.num_tokens} tokens agree"
    return f"{first} first token unpruned, KL {found.first_kl:.3g} nats; {tokens}"
