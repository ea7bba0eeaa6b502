"""Prompts wait here, first come first served, for the one thread that runs the model.

The thread computes a prompt layer by layer and hands each layer to a `Push`; when the last layer
is computed it turns to the next prompt, while the push ends on its own.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch

from services.common.cores import SharedCores
from services.common.tls import PeerTls
from services.common.tracing import Span, context_of, end_span, span, start_span
from services.prefill.channels import Channels
from services.prefill.metrics import PrefillMetrics
from services.prefill.sender import Delivered, Push
from winnow.engine.prefill import PrefillResult, run_prefill
from winnow.errors import (
    DeadlineExceeded,
    Overloaded,
    PrefillFailed,
    RequestCancelled,
    WinnowError,
)
from winnow.kv import LayerKV
from winnow.models import DecoderModel
from winnow.request import PrefillJob, PrefillOutcome, PrefillTimings
from winnow.wire import Header, TransferEncoder

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Work:
    """A job on its way; cancelling `outcome` cancels it. Times are those of time.monotonic().

    blocked_s: seconds in which the engine waited for the network to take a layer.
    """

    job: PrefillJob
    outcome: "Future[PrefillOutcome]" = field(default_factory=Future)
    received_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    computed_s: float = 0.0
    blocked_s: float = 0.0
    failed: bool = False
    transfer_span: Span | None = None
    result: PrefillResult | None = None

    @property
    def remaining_s(self) -> float:
        return self.received_s + self.job.deadline_s - time.monotonic()

    def settle(self, outcome: PrefillOutcome | WinnowError) -> None:
        """The first outcome counts; a cancelled job takes none."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, WinnowError):
                self.outcome.set_exception(outcome)
            else:
                self.outcome.set_result(outcome)


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
        """cores: those that decode workers give way on while a layer is computed."""
        self._model = model
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._num_threads = num_threads
        self._channels = Channels(peers)
        self._cores = cores
        self._changed = threading.Condition()
        self._waiting: deque[_Work] = deque()
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
        """Fails what waits or runs, and returns when the thread is gone."""
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
        """The job's outcome, once its KV is in place; cancelling it stops the work.

        Raises Overloaded if too many prompts wait already, unless the job's request was admitted
        before; PrefillFailed after `stop`.
        """
        work = _Work(job)
        with self._changed:
            if self._stopping:
                raise _stopped()
            if len(self._waiting) >= self._max_waiting and not job.admitted:
                raise Overloaded(
                    f"{len(self._waiting)} prompts wait for prefill; "
                    f"the limit is {self._max_waiting}"
                )
            self._waiting.append(work)
            self._changed.notify_all()
        work.outcome.add_done_callback(lambda _: self._forget(work))
        return work.outcome

    def _count_waiting_tokens(self) -> int:
        with self._changed:
            return sum(len(work.job.token_ids) for work in self._waiting)

    def _forget(self, work: _Work) -> None:
        """A job cancelled while it waits leaves its place to others."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(work)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # some of torch's backends count per thread
        while (work := self._next()) is not None:
            self._prefill(work)

    def _next(self) -> _Work | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or bool(self._waiting))
            return None if self._stopping else self._waiting.popleft()

    def _prefill(self, work: _Work) -> None:
        """Runs one prompt; whatever goes wrong becomes that prompt's outcome."""
        work.started_s = time.monotonic()
        try:
            self._compute(work)
        except WinnowError as error:
            self._fail(work, error)
        except Exception as error:
            logger.exception("prefill broke", extra={"request_id": work.job.request_id})
            self._fail(work, PrefillFailed(f"prefill broke: {error!r}"))

    def _compute(self, work: _Work) -> None:
        """Pushes every layer and leaves the end of the push to `_deliver`."""
        if work.remaining_s <= 0:
            raise DeadlineExceeded(f"the prompt waited {work.job.deadline_s:g} s for prefill")
        context = work.job.trace_context
        start_span("prefill.queue", context, start_s=work.received_s).end()
        work.transfer_span = start_span("kv.transfer", context)
        push = Push(
            work.job,
            self._encoder(work.job),
            lambda end: self._deliver(work, end),
            trace_context=context_of(work.transfer_span),
        )
        push.open(self._channels, work.remaining_s)
        self._metrics.transfers_in_flight.inc()
        work.outcome.add_done_callback(lambda _: push.abort(_cancelled()))  # no-op after its end
        try:
            with (
                span("prefill.compute", context, tokens=len(work.job.token_ids)) as compute,
                contextlib.closing(self._layers(work)) as layers,
            ):
                for layer in self._timed(layers):
                    compute.add_event("layer", {} if layer is None else {"layer": layer.layer_idx})
                    self._hand_over(work, push, layer)
        except Exception as error:
            push.abort(error if isinstance(error, WinnowError) else PrefillFailed(repr(error)))
            raise
        assert work.result is not None
        work.computed_s = time.monotonic()
        push.finish(work.result)

    def _layers(self, work: _Work) -> Generator[LayerKV | None, None, None]:
        work.result = yield from run_prefill(self._model, work.job.token_ids, work.job.pruning)

    def _timed(self, layers: Iterator[LayerKV | None]) -> Iterator[LayerKV | None]:
        while True:
            started_s = time.monotonic()
            try:
                with self._cores.prefilling() if self._cores else contextlib.nullcontext():
                    layer = next(layers)
            except StopIteration:
                return
            self._metrics.layer_seconds.observe(time.monotonic() - started_s)
            yield layer

    def _hand_over(self, work: _Work, push: Push, layer: LayerKV | None) -> None:
        if work.outcome.cancelled():
            raise _cancelled()
        if self._stopping:
            raise _stopped()
        if layer is None:
            return
        before_s = time.monotonic()
        push.send(layer)
        work.blocked_s += time.monotonic() - before_s

    def _encoder(self, job: PrefillJob) -> TransferEncoder:
        header = Header(
            job.request_id,
            job.attempt,
            job.ticket,
            self._model.fingerprint,
            self._model.shape,
            len(job.token_ids),
        )
        return TransferEncoder(header)

    def _deliver(self, work: _Work, end: Delivered | WinnowError) -> None:
        """Runs once when the push is over, in whichever thread ended it."""
        self._metrics.transfers_in_flight.dec()
        if work.transfer_span is not None:
            end_span(work.transfer_span, end if isinstance(end, WinnowError) else None)
        if isinstance(end, WinnowError):
            self._fail(work, end)
            return
        assert work.result is not None
        timings = PrefillTimings(
            queue_s=work.started_s - work.received_s,
            compute_s=work.computed_s - work.started_s - work.blocked_s,
            transfer_s=end.transfer_s,
            exposed_transfer_s=end.at_s - work.computed_s,
            wire_bytes=end.wire_bytes,
        )
        outcome = PrefillOutcome(work.result.report, timings)
        self._metrics.observe(outcome, work.job.pruning.method, self._model.shape)
        work.settle(outcome)

    def _fail(self, work: _Work, error: WinnowError) -> None:
        if not work.failed:  # the engine thread and the push may both report the end
            self._metrics.failures.labels(error.code).inc()
        work.failed = True
        work.settle(error)


def _cancelled() -> RequestCancelled:
    return RequestCancelled("the prefill was cancelled")


def _stopped() -> PrefillFailed:
    return PrefillFailed("the prefill worker stops")
