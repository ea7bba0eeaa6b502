"""How requests ended: one log line each, and the metrics of every prompt."""

import logging
import time
from types import TracebackType

from services.gateway.completion import Completion
from services.gateway.metrics import GatewayMetrics
from services.gateway.run import Run
from services.gateway.states import State
from winnow.errors import WinnowError

logger = logging.getLogger(__name__)


class Outcomes:
    """A context around one request, from its first check on until everything is freed."""

    def __init__(self, completion: Completion, metrics: GatewayMetrics) -> None:
        self._completion = completion
        self._metrics = metrics
        self._started_s = time.monotonic()

    def __enter__(self) -> None:
        for run in self._completion.runs:
            self._metrics.requests_received.inc()
            self._metrics.requests_running.inc()
            self._metrics.prompt_tokens.inc(len(run.request.token_ids))
            self._metrics.request_prompt_tokens.observe(len(run.request.token_ids))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._started_s
        for prompt_idx, run in enumerate(self._completion.runs):
            self._measure(prompt_idx, run, seconds)
        self._log(error, seconds)

    def _measure(self, prompt_idx: int, run: Run, seconds: float) -> None:
        choices = self._completion.choices_of(prompt_idx)
        metrics, figures = self._metrics, run.figures
        metrics.requests_running.dec()
        metrics.requests_finished.labels(_reason(run, choices[0].finish_reason)).inc()
        metrics.request_seconds.observe(seconds)
        num_generated = sum(choice.num_tokens for choice in choices)
        metrics.generated_tokens.inc(num_generated)
        metrics.request_generated_tokens.observe(num_generated)
        metrics.prefill_retries.inc(max(0, figures.attempts - 1 - figures.migrations))
        if figures.ttft_s is not None:
            metrics.ttft.observe(figures.ttft_s)
            num_later = max(choice.num_tokens for choice in choices) - 1
            if num_later:
                metrics.time_per_output_token.observe((seconds - figures.ttft_s) / num_later)

    def _log(self, error: BaseException | None, seconds: float) -> None:
        completion = self._completion
        logger.info(
            "%s: %d prompt tokens, %d generated, %.3f s; %s",
            _outcome(error),
            sum(len(prompt.token_ids) for prompt in completion.ask.prompts),
            sum(choice.num_tokens for choice in completion.choices),
            seconds,
            "; ".join(map(_figures, completion.runs)),
            extra={"request_id": completion.ask.request_id},
        )


def _reason(run: Run, finish_reason: str | None) -> str:
    """The label of a run's end; of several choices the first one's."""
    if run.state is State.FINISHED:
        return str(finish_reason)
    return "error" if run.state is State.FAILED else "cancelled"


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, WinnowError):
        return f"failed ({error.code}: {error.message})"
    return "failed (internal_error)" if isinstance(error, Exception) else "cancelled"


def _figures(run: Run) -> str:
    figures = run.figures
    report, timings = figures.report, figures.timings
    if report is None or (figures.ttft_s is None and run.state is not State.FINISHED):
        return f"{run.state} before the first token"
    layer = report.no_selection_reason if report.selection_layer is None else report.selection_layer
    first = "nothing generated" if figures.ttft_s is None else f"ttft {figures.ttft_s:.3f} s"
    return (
        f"{first}, selection layer {layer}, "
        f"KV {report.kv_bytes_kept} of {report.kv_bytes_full} bytes, "
        f"{timings.wire_bytes if timings else 'unknown'} on the wire"
    )
