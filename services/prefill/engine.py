"""The prefill engine: computes prompts step by step, and hands each layer to the prompt's `Push`.

A step is one layer, or one block of log-probabilities. After its last step a prompt is over for the
engine, while its push completes on its own.
"""

import contextlib
import logging
import time
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from services.common.cores import SharedCores
from services.common.jobs import PrefillJob, PrefillOutcome, PrefillTimings
from services.common.tracing import context_of, end_span, start_span
from services.prefill.adapters import used_adapter
from services.prefill.channels import Channels
from services.prefill.metrics import PrefillMetrics
from services.prefill.sender import Delivered, Push
from services.prefill.split_push import SplitPush
from services.prefill.transfers import Transfers
from services.prefill.work import Work
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.prompt_logprobs import PromptLogprobsRun, scoring_layer_tokens
from winnow.engine.score_watch import ScoreWatch
from winnow.errors import PrefillFailed, RequestCancelled, WinnowError
from winnow.kv import LayerKV
from winnow.methods.base import LayerView
from winnow.side_stream import Pace

logger = logging.getLogger(__name__)


def store_for(job: PrefillJob, store: PrefixStore | None) -> PrefixStore | None:
    """None for log-probabilities of the prompt: they need the hidden states of all tokens."""
    return None if job.num_prompt_logprobs is not None else store


class PrefillEngine:
    """Used by one thread, except that a push reports its end on its own."""

    def __init__(
        self,
        model: DecoderModel,
        metrics: PrefillMetrics,
        channels: Channels,
        cores: SharedCores | None,
        transfers: Transfers,
        store: PrefixStore | None = None,
    ) -> None:
        self._model = model
        self._metrics = metrics
        self._channels = channels
        self._cores = cores
        self._store = store
        self._transfers = transfers
        self._pace = Pace(model.device)
        self.is_broken = False  # its device has failed: a GPU that failed once fails ever after

    def advance(self, work: Work) -> bool:
        """Compute the prompt's next step; any error becomes that prompt's outcome.

        Returns False if its last layers have to leave first, which is waited for a moment.
        """
        try:
            if not self._has_room(work):
                return False
            self._advance(work)
        except WinnowError as error:
            self.end(work, error)
        except Exception as error:
            logger.exception("prefill broke", extra={"request_id": work.job.request_id})
            self.is_broken = not _works(self._model.device)
            self.end(work, PrefillFailed(f"prefill broke: {error!r}"))
        return True

    def end(self, work: Work, error: WinnowError) -> None:
        """End a prompt that is not computed to its end; an outcome that it has stands."""
        try:
            self._close(work)
        finally:  # what a run holds of the prefix store a broken device may keep
            if work.compute_span is not None:
                end_span(work.compute_span, error)
            if work.push is not None:
                work.push.abort(error)
            self._fail(work, error)

    def _has_room(self, work: Work) -> bool:
        if work.push is None or work.scoring is not None:
            return True
        started_s = time.monotonic()
        has_room = work.push.wait_for_room()
        work.blocked_s += time.monotonic() - started_s
        return has_room

    def _advance(self, work: Work) -> None:
        if work.run is None:
            self._begin(work)
        if work.scoring is None:
            self._compute_layer(work)
        else:
            self._compute_block(work, work.scoring)
        if work.result is not None and (work.scoring is None or work.scoring.finished):
            self._complete(work)

    def _begin(self, work: Work) -> None:
        context = work.job.trace_context
        start_span("prefill.queue", context, start_s=work.received_s).end()
        work.compute_span = start_span("prefill.compute", context)
        work.compute_span.set_attribute("tokens", len(work.job.token_ids))
        work.run = self._open_run(work)
        work.push = self._open_push(work)

    def _open_run(self, work: Work) -> PrefillRun:
        job = work.job
        if job.explains:
            work.watch = ScoreWatch(job.pruning, len(job.token_ids), self._model.shape)
        if job.adapter is not None:
            work.adapter = used_adapter(self._model, job.adapter)
        return PrefillRun(
            self._model,
            job.token_ids,
            job.pruning,
            work.watch,
            store=store_for(job, self._store),
            cache_salt=job.cache_salt,
            adapter=work.adapter,
            is_long=job.is_long,
            pack=lambda *layer: _pack_for(work, *layer),
        )

    def _open_push(self, work: Work) -> Push | SplitPush | None:
        job = work.job
        if job.kv_address is None:
            return None
        work.transfer_span = start_span("kv.transfer", job.trace_context)
        push = self._transfers.push(
            job,
            job.kv_address,
            lambda end: self._deliver(work, end),
            context_of(work.transfer_span),
        )
        push.open(self._channels, work.remaining_s)
        self._metrics.transfers_in_flight.inc()
        work.outcome.add_done_callback(lambda _: push.abort(cancelled()))  # no-op after its end
        return push

    def _compute_layer(self, work: Work) -> None:
        assert work.run is not None and work.compute_span is not None
        started_s = time.monotonic()
        with self._computing(work.job):
            layer = work.run.compute_layer()
            self._pace.end_step(ahead=0 if work.run.finished else 1)
        computed_s = time.monotonic()
        work.compute_s += computed_s - started_s
        self._metrics.layer_seconds.observe(computed_s - started_s)
        work.compute_span.add_event("layer", {} if layer is None else {"layer": layer.layer_idx})
        if layer is not None and work.push is not None:
            work.push.send(self._transfers.as_sent(layer))
        if work.run.finished:
            self._take_result(work, work.run)

    def _take_result(self, work: Work, run: PrefillRun) -> None:
        """Keep a finished run's result; its hidden states are those to score, if requested."""
        job = work.job
        result = run.result(keep_hidden=job.num_prompt_logprobs is not None)
        work.result = replace(result, hidden=None)
        if result.hidden is not None and job.num_prompt_logprobs is not None:
            work.scoring = PromptLogprobsRun(
                self._model,
                result.hidden[job.scored_from :],
                job.token_ids[job.scored_from :],
                job.num_prompt_logprobs,
            )

    def _compute_block(self, work: Work, scoring: PromptLogprobsRun) -> None:
        started_s = time.monotonic()
        with self._computing(work.job):
            scoring.compute_block()
            self._pace.end_step(ahead=0 if scoring.finished else 1)
        work.compute_s += time.monotonic() - started_s
        work.scoring_layer_tokens = scoring_layer_tokens(self._model, scoring.num_tokens_left)

    def _computing(self, job: PrefillJob) -> AbstractContextManager[None]:
        """Let decode workers on the same cores see that prefill is computing.

        Not for a job that gives way.
        """
        if self._cores is None or job.gives_way:
            return contextlib.nullcontext()
        return self._cores.prefilling()

    def _complete(self, work: Work) -> None:
        """End a computed prompt's part of the work; `_deliver` handles the end of its push."""
        assert work.result is not None and work.compute_span is not None
        work.computed_s = time.monotonic()
        work.compute_span.end()
        if work.scoring is not None:
            work.logprobs = work.scoring.result()
        self._close(work)
        if work.push is None:
            self._settle(work, None)
        else:
            work.push.finish(work.result)

    def _close(self, work: Work) -> None:
        work.close()
        if self._store is not None:
            self._metrics.observe_store(self._store.stats())

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
            queue_s=work.queue_s,
            compute_s=work.compute_s,
            transfer_s=end.transfer_s if end else 0.0,
            exposed_transfer_s=end.at_s - work.computed_s if end else 0.0,
            wire_bytes=end.wire_bytes if end else 0,
        )
        scores = None if work.watch is None else work.watch.result()
        outcome = PrefillOutcome(work.result.report, timings, work.logprobs, scores)
        if end is not None:
            self._metrics.observe(outcome, work.job.pruning.method, self._model.shape)
        elif not work.job.gives_way:
            self._metrics.observe_engine(timings)
        work.settle(outcome)

    def _fail(self, work: Work, error: WinnowError) -> None:
        is_told = work.error is not None  # the engine's thread and the push may both report the end
        if not is_told and not work.job.gives_way:
            self._metrics.failures.labels(error.code).inc()
        work.error = work.error or error
        work.settle(error)


def _pack_for(
    work: Work, view: LayerView, values: Tensor, positions: Tensor, kept: list[Tensor] | None
) -> LayerKV:
    """What is sent of a layer from this process."""
    if isinstance(work.push, SplitPush):
        return work.push.pack(view, values, positions, kept)
    return view.pack(values, positions, kept)


def _works(device: torch.device) -> bool:
    """Whether it still computes; one whose memory is full does, once a prompt has ended."""
    try:
        return float(torch.ones(1, device=device).add_(1)) == 2
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def cancelled() -> RequestCancelled:
    return RequestCancelled("the prefill was cancelled")
