"""Outcome of each request: one log line, and metrics for every prompt."""

import logging
import time
from types import TracebackType

from services.gateway.metrics import GatewayMetrics
from services.gateway.request.run import Run
from services.gateway.request.running_request import RunningRequest
from services.gateway.request.states import State
from winnow.errors import WinnowError

logger = logging.getLogger(__name__)


class Outcomes:
    """Context manager around one request, from before its admission until everything is freed."""

    def __init__(self, running: RunningRequest, metrics: GatewayMetrics) -> None:
        self._running = running
        self._metrics = metrics
        self._started_s = time.monotonic()

    def __enter__(self) -> None:
        for run in self._running.runs:
            self._metrics.requests_received.inc()
            self._metrics.requests_running.inc()
            self._metrics.prompt_tokens.inc(len(run.request.token_ids))
            self._metrics.request_prompt_tokens.observe(len(run.request.token_ids))
            if run.request.adapter is not None:
                adapter = self._metrics.adapter_label(run.request.adapter.name)
                self._metrics.adapter_requests.labels(adapter).inc()
                self._metrics.adapter_prompt_tokens.labels(adapter).inc(len(run.request.token_ids))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._started_s
        for prompt_idx, run in enumerate(self._running.runs):
            self._measure(prompt_idx, run)
        self._log(error, seconds)

    def _measure(self, prompt_idx: int, run: Run) -> None:
        choices = self._running.choices_of(prompt_idx)
        metrics, stats = self._metrics, run.stats
        metrics.requests_running.dec()
        metrics.requests_finished.labels(_reason(run, choices[0].finish_reason)).inc()
        if stats.seconds is not None:
            metrics.request_seconds.observe(stats.seconds)
        num_generated = sum(choice.num_tokens for choice in choices)
        metrics.generated_tokens.inc(num_generated)
        metrics.request_generated_tokens.observe(num_generated)
        if run.request.adapter is not None:
            adapter = metrics.adapter_label(run.request.adapter.name)
            metrics.adapter_generated_tokens.labels(adapter).inc(num_generated)
        metrics.prefill_retries.inc(max(0, stats.attempts - 1 - stats.migrations))
        if stats.ttft_s is None or stats.last_token_s is None:
            return
        metrics.ttft.observe(stats.ttft_s)
        num_later = max(choice.num_tokens for choice in choices) - 1
        if num_later > 0:
            seconds = stats.last_token_s - stats.ttft_s
            metrics.time_per_output_token.observe(seconds / num_later)

    def _log(self, error: BaseException | None, seconds: float) -> None:
        running = self._running
        logger.info(
            "%s: %d prompt tokens, %d generated, %.3f s; %s",
            _outcome(error),
            sum(len(prompt.token_ids) for prompt in running.request.prompts),
            sum(choice.num_tokens for choice in running.choices),
            seconds,
            "; ".join(map(_stats, running.runs)),
            extra={"request_id": running.request.request_id},
        )


def _reason(run: Run, finish_reason: str | None) -> str:
    """The finish label of a run; of several choices the first one's."""
    if run.state is State.FINISHED:
        return str(finish_reason)
    return "error" if run.state is State.FAILED else "cancelled"


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, WinnowError):
        return f"failed ({error.code}: {error.message})"
    return "failed (internal_error)" if isinstance(error, Exception) else "cancelled"


def _stats(run: Run) -> str:
    stats = run.stats
    report, timings = stats.report, stats.timings
    if report is None or (stats.ttft_s is None and run.state is not State.FINISHED):
        return f"{run.state} before the first token"
    layer = report.no_selection_reason if report.selection_layer is None else report.selection_layer
    first = "nothing generated" if stats.ttft_s is None else f"ttft {stats.ttft_s:.3f} s"
    return (
        f"{first}, {report.num_cached_tokens} tokens cached, selection layer {layer}, "
        f"KV {report.kv_bytes_kept} of {report.kv_bytes_full} bytes, "
        f"{timings.wire_bytes if timings else 'unknown'} on the wire"
    )
