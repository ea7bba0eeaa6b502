"""The prefill queue: prompts wait, first come first served, for the thread that runs the model.

The thread computes a prompt layer by layer and hands each layer to a `Push`. After the last layer
it starts the next prompt, while the push completes on its own.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from services.common.cores import SharedCores
from services.common.jobs import PrefillJob, PrefillOutcome, PrefillTimings
from services.common.tls import PeerTls
from services.common.tracing import Span, context_of, end_span, span, start_span
from services.prefill.channels import Channels
from services.prefill.metrics import PrefillMetrics
from services.prefill.sender import Delivered, Push
from services.prefill.work import Work
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prompt_logprobs import PromptLogprobsRun
from winnow.errors import (
    DeadlineExceeded,
    Overloaded,
    PrefillFailed,
    RequestCancelled,
    WinnowError,
)
from winnow.kv import LayerKV
from winnow.wire import Header, TransferEncoder

logger = logging.getLogger(__name__)


class PrefillQueue:
    """Owns the engine thread of a prefill worker."""

    def __init__(
        self,
        model: DecoderModel,
        metrics: PrefillMetrics,
        *,
        max_waiting: int,
        num_threads: int,
        peers: PeerTls | None = None,
        cores: SharedCores | None = None,
    ) -> None:
        """cores: those on which decode workers yield while a layer is computed."""
        self._model = model
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._num_threads = num_threads
        self._channels = Channels(peers)
        self._cores = cores
        self._changed = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._current: Work | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="prefill-engine", daemon=True)
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.waiting_tokens.set_function(self._count_waiting_tokens)
        metrics.device_memory_bytes.set_function(lambda: model.memory_bytes)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Fail all waiting and running jobs, and return when the thread has ended."""
        with self._changed:
            self._stopping = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for work in left:
            work.settle(_stopped())
        self._thread.join()
        self._channels.close()
        if self._cores is not None:
            self._cores.close()

    def submit(self, job: PrefillJob) -> "Future[PrefillOutcome]":
        """The job's outcome, once its KV is in place; cancelling the future stops the work.

        Raises Overloaded if too many prompts are waiting, unless the job's request was admitted
        before, and for a job that gives way if there is any other; PrefillFailed after `stop`.
        """
        work = Work(job)
        with self._changed:
            if self._stopping:
                raise _stopped()
            self._require_room(job)
            self._waiting.append(work)
            self._changed.notify_all()
        work.outcome.add_done_callback(lambda _: self._forget(work))
        return work.outcome

    def _require_room(self, job: PrefillJob) -> None:
        computes = self._current is not None and not self._current.outcome.done()
        if job.gives_way and (self._waiting or computes):
            raise _given_way()
        num_waiting = sum(not work.job.gives_way for work in self._waiting)
        if num_waiting >= self._max_waiting and not job.admitted:
            raise Overloaded(
                f"{num_waiting} prompts wait for prefill; the limit is {self._max_waiting}"
            )

    def _count_waiting_tokens(self) -> int:
        with self._changed:
            return sum(len(work.job.token_ids) for work in self._waiting)

    def _forget(self, work: Work) -> None:
        """Remove a job that was cancelled while waiting, to free its place."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(work)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # some torch backends have a per-thread setting
        while (work := self._next()) is not None:
            self._prefill(work)

    def _next(self) -> Work | None:
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._stopping or bool(self._waiting))
            self._current = None if self._stopping else self._waiting.popleft()
            return self._current

    def _prefill(self, work: Work) -> None:
        """Run one prompt; any error becomes that prompt's outcome."""
        work.started_s = time.monotonic()
        try:
            self._compute(work)
        except WinnowError as error:
            self._fail(work, error)
        except Exception as error:
            logger.exception("prefill broke", extra={"request_id": work.job.request_id})
            self._fail(work, PrefillFailed(f"prefill broke: {error!r}"))

    def _compute(self, work: Work) -> None:
        """Run the prompt and push its KV meanwhile; `_deliver` handles the end of the push."""
        if work.remaining_s <= 0:
            raise DeadlineExceeded(f"the prompt waited {work.job.deadline_s:g} s for prefill")
        self._require_wanted(work)
        context = work.job.trace_context
        start_span("prefill.queue", context, start_s=work.received_s).end()
        push = self._open_push(work)
        try:
            with span("prefill.compute", context, tokens=len(work.job.token_ids)) as compute:
                self._run_layers(work, push, compute)
                self._score(work)
        except Exception as error:
            if push is not None:
                push.abort(error if isinstance(error, WinnowError) else PrefillFailed(repr(error)))
            raise
        assert work.result is not None
        work.computed_s = time.monotonic()
        if push is None:
            self._settle(work, None)
        else:
            push.finish(work.result)

    def _open_push(self, work: Work) -> Push | None:
        job = work.job
        if job.kv_address is None:
            return None
        work.transfer_span = start_span("kv.transfer", job.trace_context)
        push = Push(
            job.kv_address,
            self._encoder(job),
            lambda end: self._deliver(work, end),
            trace_context=context_of(work.transfer_span),
        )
        push.open(self._channels, work.remaining_s)
        self._metrics.transfers_in_flight.inc()
        work.outcome.add_done_callback(lambda _: push.abort(_cancelled()))  # no-op after its end
        return push

    def _run_layers(self, work: Work, push: Push | None, compute: Span) -> None:
        job = work.job
        run = PrefillRun(self._model, job.token_ids, job.pruning)
        while not run.finished:
            started_s = time.monotonic()
            with self._computing(job):
                layer = run.compute_layer()
            self._metrics.layer_seconds.observe(time.monotonic() - started_s)
            compute.add_event("layer", {} if layer is None else {"layer": layer.layer_idx})
            self._require_wanted(work)
            if layer is not None and push is not None:
                self._hand_over(work, push, layer)
        work.result = run.result(keep_hidden=job.num_prompt_logprobs is not None)

    def _computing(self, job: PrefillJob) -> AbstractContextManager[None]:
        """Let decode workers on the same cores see that prefill is computing.

        Not for a job that gives way.
        """
        if self._cores is None or job.gives_way:
            return contextlib.nullcontext()
        return self._cores.prefilling()

    def _require_wanted(self, work: Work) -> None:
        """Raise if the job was cancelled or has to give way, or the worker is stopping."""
        if work.outcome.cancelled():
            raise _cancelled()
        if self._stopping:
            raise _stopped()
        if work.job.gives_way and self._waiting:
            raise _given_way()

    def _hand_over(self, work: Work, push: Push, layer: LayerKV) -> None:
        before_s = time.monotonic()
        push.send(layer)
        work.blocked_s += time.monotonic() - before_s

    def _score(self, work: Work) -> None:
        """Compute the prompt's log-probabilities, if requested, and free its hidden states."""
        job, result = work.job, work.result
        if job.num_prompt_logprobs is None or result is None or result.hidden is None:
            return
        work.result = replace(result, hidden=None)
        run = PromptLogprobsRun(
            self._model,
            result.hidden[job.scored_from :],
            job.token_ids[job.scored_from :],
            job.num_prompt_logprobs,
        )
        while not run.finished:
            with self._computing(job):
                run.compute_block()
            self._require_wanted(work)
        work.logprobs = run.result()

    def _encoder(self, job: PrefillJob) -> TransferEncoder:
        assert job.ticket is not None
        header = Header(
            job.request_id,
            job.attempt,
            job.ticket,
            self._model.fingerprint,
            self._model.shape,
            len(job.token_ids),
        )
        return TransferEncoder(header)

    def _deliver(self, work: Work, end: Delivered | WinnowError) -> None:
        """Called once when the push has ended, on the thread that ended it."""
        self._metrics.transfers_in_flight.dec()
        if work.transfer_span is not None:
            end_span(work.transfer_span, end if isinstance(end, WinnowError) else None)
        if isinstance(end, WinnowError):
            self._fail(work, end)
            return
        self._settle(work, end)

    def _settle(self, work: Work, end: Delivered | None) -> None:
        """Set the job's outcome; `end` is None if there was nothing to deliver."""
        assert work.result is not None
        timings = PrefillTimings(
            queue_s=work.started_s - work.received_s,
            compute_s=work.computed_s - work.started_s - work.blocked_s,
            transfer_s=end.transfer_s if end else 0.0,
            exposed_transfer_s=end.at_s - work.computed_s if end else 0.0,
            wire_bytes=end.wire_bytes if end else 0,
        )
        outcome = PrefillOutcome(work.result.report, timings, work.logprobs)
        if end is not None:
            self._metrics.observe(outcome, work.job.pruning.method, self._model.shape)
        elif not work.job.gives_way:
            self._metrics.observe_engine(timings)
        work.settle(outcome)

    def _fail(self, work: Work, error: WinnowError) -> None:
        is_told = work.failed  # the engine thread and the push may both report the end
        if not is_told and not work.job.gives_way:
            self._metrics.failures.labels(error.code).inc()
        work.failed = True
        work.settle(error)


def _cancelled() -> RequestCancelled:
    return RequestCancelled("the prefill was cancelled")


def _given_way() -> Overloaded:
    return Overloaded("the prefill worker has other prompts to compute")


def _stopped() -> PrefillFailed:
    return PrefillFailed("the prefill worker stops")
