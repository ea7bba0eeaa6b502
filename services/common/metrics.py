"""The one door to prometheus_client: what each kind of process measures.

A process makes one of the classes below at its start; each has a registry of its own, so that
several can live in one process (tests do that). Gauges of an engine are set by its thread.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)

from winnow.errors import InvalidSetting
from winnow.request import PrefillOutcome

CONTENT_TYPE = CONTENT_TYPE_LATEST

FINISH_REASONS = ("stop", "length", "error", "cancelled")
NO_SELECTION_REASONS = ("off", "short_prompt", "threshold_not_met")

TTFT_BUCKETS_S = tuple(0.001 * 2**i for i in range(0, 22))  # 1 ms to 35 min
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5, 10)
COUNT_BUCKETS = tuple(float(4**i) for i in range(0, 12))  # 1 to 4 M tokens
BYTES_BUCKETS = tuple(float(4**i) for i in range(5, 18))  # 1 KiB to 16 GiB
LAYER_BUCKETS = tuple(float(layer) for layer in range(0, 64))
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Metrics:
    """One process's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def _counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self.registry)


class GatewayMetrics(_Metrics):
    """What clients see, and what the pruning saved them."""

    def __init__(self) -> None:
        super().__init__()
        self.requests_received = self._counter(
            "winnow_requests_received", "Prompts accepted for completion"
        )
        self.requests_finished = self._counter(
            "winnow_requests_finished", "Prompts ended, by reason", ["reason"]
        )
        self.requests_refused = self._counter(
            "winnow_requests_refused", "Requests refused, by error code", ["code"]
        )
        self.requests_running = self._gauge(
            "winnow_requests_running", "Prompts accepted and not ended"
        )
        self.prefill_retries = self._counter("winnow_prefill_retries", "Prefills tried again")
        self.ttft = self._histogram(
            "winnow_ttft_seconds", "From a prompt's arrival to its first token", TTFT_BUCKETS_S
        )
        self.inter_token = self._histogram(
            "winnow_inter_token_seconds", "Between two tokens of one sequence", TOKEN_BUCKETS_S
        )
        self.request_seconds = self._histogram(
            "winnow_request_seconds", "From a prompt's arrival to its end", TTFT_BUCKETS_S
        )
        self.prompt_tokens = self._histogram(
            "winnow_prompt_tokens", "Tokens per prompt", COUNT_BUCKETS
        )
        self.generated_tokens = self._histogram(
            "winnow_generated_tokens", "Tokens generated per prompt", COUNT_BUCKETS
        )
        _make_children(self.requests_finished, FINISH_REASONS)


class PrefillMetrics(_Metrics):
    """What a prefill worker does."""

    def __init__(self) -> None:
        super().__init__()
        self.queue_depth = self._gauge(
            "winnow_prefill_queue_depth", "Prompts waiting for the engine"
        )
        self.queue_seconds = self._histogram(
            "winnow_prefill_queue_seconds", "A prompt's wait for the engine", TTFT_BUCKETS_S
        )
        self.compute_seconds = self._histogram(
            "winnow_prefill_compute_seconds", "Forward passes of one prompt", TTFT_BUCKETS_S
        )
        self.transfer_seconds = self._histogram(
            "winnow_transfer_seconds", "First frame sent to receipt", TTFT_BUCKETS_S
        )
        self.exposed_transfer_seconds = self._histogram(
            "winnow_exposed_transfer_seconds",
            "End of compute to receipt: transfer that compute did not hide",
            TTFT_BUCKETS_S,
        )
        self.wire_bytes = self._counter("winnow_wire_bytes", "Bytes of all frames sent to decode")
        self.kv_full_bytes = self._histogram(
            "winnow_kv_full_bytes", "Keys and values of every token of a prompt", BYTES_BUCKETS
        )
        self.kv_kept_bytes = self._histogram(
            "winnow_kv_kept_bytes", "Keys and values of a prompt that were sent", BYTES_BUCKETS
        )
        self.selection_layer = self._histogram(
            "winnow_selection_layer",
            "Layer after which only selected tokens went on",
            LAYER_BUCKETS,
        )
        self.no_selection = self._counter(
            "winnow_no_selection", "Prompts without selection, by reason", ["reason"]
        )
        self.computed_ratio = self._histogram(
            "winnow_computed_ratio",
            "Layer-tokens computed of all, 0 to 1; to 2 where a method computes twice",
            (*(i / 20 for i in range(1, 21)), 1.25, 1.5, 1.75, 2),
        )
        self.failures = self._counter(
            "winnow_prefill_failures", "Prefills begun and not delivered, by error code", ["code"]
        )
        _make_children(self.no_selection, NO_SELECTION_REASONS)

    def observe(self, outcome: PrefillOutcome) -> None:
        """Count one prompt whose KV is in place."""
        timings, report = outcome.timings, outcome.report
        self.queue_seconds.observe(timings.queue_s)
        self.compute_seconds.observe(timings.compute_s)
        self.transfer_seconds.observe(timings.transfer_s)
        self.exposed_transfer_seconds.observe(timings.exposed_transfer_s)
        self.wire_bytes.inc(timings.wire_bytes)
        self.kv_full_bytes.observe(report.kv_bytes_full)
        self.kv_kept_bytes.observe(report.kv_bytes_kept)
        self.computed_ratio.observe(report.computed_share)
        if report.selection_layer is not None:
            self.selection_layer.observe(report.selection_layer)
        if report.no_selection_reason is not None:
            self.no_selection.labels(report.no_selection_reason).inc()


class DecodeMetrics(_Metrics):
    """What a decode worker holds and does."""

    def __init__(self) -> None:
        super().__init__()
        self.pages_total = self._gauge("winnow_kv_pages", "Pages of the pool")
        self.pages_used = self._gauge("winnow_kv_pages_used", "Pages with entries")
        self.pages_reserved = self._gauge(
            "winnow_kv_pages_reserved", "Pages promised to admitted requests"
        )
        self.kv_bytes = self._gauge("winnow_kv_bytes", "Keys and values held")
        self.running_sequences = self._gauge(
            "winnow_decode_running_sequences", "Sequences in the batch"
        )
        self.step_seconds = self._histogram(
            "winnow_decode_step_seconds", "One step of the whole batch", TOKEN_BUCKETS_S
        )
        self.batch_size = self._histogram(
            "winnow_decode_batch_size", "Sequences per step", BATCH_BUCKETS
        )
        self.recompressed_entries = self._counter(
            "winnow_recompressed_entries", "KV entries that decode dropped"
        )
        self.received_bytes = self._counter(
            "winnow_transfer_received_bytes", "Payload bytes received from prefill"
        )
        self.transfers_failed = self._counter(
            "winnow_transfers_failed", "Transfers refused or broken, by error code", ["code"]
        )
        self.lease_expiries = self._counter(
            "winnow_lease_expiries", "Reservations whose KV did not come in time"
        )


def _make_children(metric: Counter, values: Iterable[str]) -> None:
    """Every known label value shows from the start, as 0."""
    for value in values:
        metric.labels(value)


def render(registry: CollectorRegistry) -> bytes:
    """The metrics as Prometheus's text, of type CONTENT_TYPE."""
    return generate_latest(registry)


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """Serves one registry's /metrics from a thread of its own."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics_server(
    registry: CollectorRegistry, port: int, host: str = "127.0.0.1"
) -> MetricsServer:
    """A server of /metrics; port 0 is any free one.  Raises InvalidSetting if it is taken."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InvalidSetting(
            f"metrics cannot be served on {host}:{port}: {error.strerror}", param="metrics_port"
        ) from error
    return MetricsServer(server.server_port, server, thread)
