"""Prometheus metrics of a prefill worker and its pruning."""

from collections.abc import Callable

from services.common.jobs import PrefillOutcome, PrefillTimings
from services.common.metrics import (
    BYTES_BUCKETS,
    LAYER_BUCKETS,
    RATIO_BUCKETS,
    REQUEST_BUCKETS_S,
    TOKEN_BUCKETS_S,
    WorkerMetrics,
)
from winnow.catalog import METHODS
from winnow.engine.prefix.store import PrefixStats
from winnow.errors import ERROR_CODES
from winnow.kv import ModelShape
from winnow.report import PrefillReport

NO_SELECTION_REASONS = ("off", "short_prompt", "threshold_not_met")
RHO_BUCKETS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_METHOD = ("method", tuple(METHODS))


class PrefillMetrics(WorkerMetrics):
    """Metrics of one prefill worker."""

    role = "prefill"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._measure_engine()
        self._measure_transfers()
        self._measure_pruning()
        self._measure_store()

    def _measure_engine(self) -> None:
        self.waiting = self._gauge("winnow_prefill_waiting", "Prompts waiting to begin")
        self.waiting_tokens = self._gauge(
            "winnow_prefill_waiting_tokens", "Tokens of the prompts waiting to begin"
        )
        self.open = self._gauge(
            "winnow_prefill_open", "Prompts begun and not computed to their end, paused ones too"
        )
        self.oldest_seconds = self._gauge(
            "winnow_prefill_oldest_seconds",
            "Time since the oldest prompt came that is not computed to its end; 0 without any",
        )
        self.queue_seconds = self._histogram(
            "winnow_prefill_queue_seconds",
            "A prompt's wait for the engine, before its first layer and between two",
            REQUEST_BUCKETS_S,
        )
        self.compute_seconds = self._histogram(
            "winnow_prefill_compute_seconds", "Forward passes of one prompt", REQUEST_BUCKETS_S
        )
        self.layer_seconds = self._histogram(
            "winnow_prefill_layer_seconds", "One layer of one prompt", TOKEN_BUCKETS_S
        )
        self.failures = self._counter(
            "winnow_prefill_failures",
            "Prefills begun and not delivered, by error code",
            "reason",
            ERROR_CODES,
        )

    def _measure_transfers(self) -> None:
        self.transfer_seconds = self._histogram(
            "winnow_transfer_seconds", "First frame sent to receipt", REQUEST_BUCKETS_S
        )
        self.exposed_transfer_seconds = self._histogram(
            "winnow_exposed_transfer_seconds",
            "End of compute to receipt: transfer that compute did not hide",
            REQUEST_BUCKETS_S,
        )
        self.wire_bytes = self._counter("winnow_wire_bytes", "Bytes of all frames sent to decode")
        self.state_bytes = self._counter(
            "winnow_state_bytes", "States of recurrent layers that were sent"
        )
        self.kv_full_bytes = self._histogram(
            "winnow_kv_full_bytes", "Keys and values of every token of a prompt", BYTES_BUCKETS
        )
        self.kv_kept_bytes = self._histogram(
            "winnow_kv_kept_bytes", "Keys and values of a prompt that were sent", BYTES_BUCKETS
        )

    def _measure_pruning(self) -> None:
        self.selection_layer = self._histogram(
            "winnow_selection_layer",
            "Layer after which only selected tokens went on",
            LAYER_BUCKETS,
            *_METHOD,
        )
        self.selection_full_layer = self._histogram(
            "winnow_selection_full_layer",
            "Which of the model's full layers that was, from 1",
            LAYER_BUCKETS,
            *_METHOD,
        )
        self.no_selection = self._counter(
            "winnow_no_selection", "Prompts without selection", "reason", NO_SELECTION_REASONS
        )
        self.selection_rho = self._histogram(
            "winnow_selection_rho",
            "Relative rank variance at the layer where ASL selected",
            RHO_BUCKETS,
            *_METHOD,
        )
        self.computed_ratio = self._histogram(
            "winnow_computed_ratio",
            "Layer-tokens computed of all, 0 to 1; to 2 where a method computes twice",
            (*RATIO_BUCKETS, 1.25, 1.5, 1.75, 2),
            *_METHOD,
        )
        self.kv_kept_ratio = self._histogram(
            "winnow_kv_kept_ratio", "Keys and values sent, of all", RATIO_BUCKETS, *_METHOD
        )

    def _measure_store(self) -> None:
        self.prefix_looked_up_tokens = self._counter(
            "winnow_prefix_looked_up_tokens",
            "Tokens of prompts for which the prefix store was asked",
        )
        self.prefix_hit_tokens = self._counter(
            "winnow_prefix_hit_tokens", "Those of them that it had, which layer 0 did not compute"
        )
        self.prefix_evicted_blocks = self._counter(
            "winnow_prefix_evicted_blocks", "Blocks given up for want of prefix_cache_bytes"
        )
        self.prefix_moved_blocks = self._counter(
            "winnow_prefix_moved_blocks",
            "Blocks moved to host memory for want of prefix_cache_device_bytes",
        )
        self.prefix_damaged_blocks = self._counter(
            "winnow_prefix_damaged_blocks",
            "Blocks that failed their checksum, and were dropped",
        )
        self.prefix_blocks = self._gauge("winnow_prefix_blocks", "Blocks in the prefix store")
        self.prefix_blocks_in_use = self._gauge(
            "winnow_prefix_blocks_in_use", "Those that prompts hold now, which are not evicted"
        )
        self.prefix_bytes = self._gauge("winnow_prefix_resident_bytes", "Memory that they take")
        self.prefix_limit_bytes = self._gauge(
            "winnow_prefix_limit_bytes",
            "Their limit: prefix_cache_bytes, and what there is beside the model besides; 0 "
            "without a prefix store",
        )
        self.prefix_device_bytes = self._gauge(
            "winnow_prefix_device_resident_bytes", "Memory that they take beside the model"
        )
        self.prefix_device_limit_bytes = self._gauge(
            "winnow_prefix_device_limit_bytes", "The limit of that; 0 without a prefix store"
        )

    def watch_store(self, stats: Callable[[], PrefixStats]) -> None:
        """Read the gauges of the prefix store from `stats` at scrape time; call it once."""
        self._seen = stats()
        self.prefix_blocks.set_function(lambda: stats().num_blocks)
        self.prefix_blocks_in_use.set_function(lambda: stats().num_blocks_in_use)
        self.prefix_bytes.set_function(lambda: stats().used_bytes)
        self.prefix_limit_bytes.set(stats().max_bytes)
        self.prefix_device_bytes.set_function(lambda: stats().device_used_bytes)
        self.prefix_device_limit_bytes.set(stats().device_max_bytes)

    def observe_store(self, stats: PrefixStats) -> None:
        """Count what has changed since the last call, or since `watch_store`."""
        seen, self._seen = self._seen, stats
        self.prefix_looked_up_tokens.inc(stats.looked_up_tokens - seen.looked_up_tokens)
        self.prefix_hit_tokens.inc(stats.hit_tokens - seen.hit_tokens)
        self.prefix_moved_blocks.inc(stats.moved_blocks - seen.moved_blocks)
        self.prefix_evicted_blocks.inc(stats.evicted_blocks - seen.evicted_blocks)
        self.prefix_damaged_blocks.inc(stats.damaged_blocks - seen.damaged_blocks)

    def observe_engine(self, timings: PrefillTimings) -> None:
        """Record one computed prompt whose KV is not kept."""
        self.queue_seconds.observe(timings.queue_s)
        self.compute_seconds.observe(timings.compute_s)

    def observe(self, outcome: PrefillOutcome, method: str, shape: ModelShape) -> None:
        """Record one prompt whose KV is in place."""
        timings, report = outcome.timings, outcome.report
        self.observe_engine(timings)
        self.transfer_seconds.observe(timings.transfer_s)
        self.exposed_transfer_seconds.observe(timings.exposed_transfer_s)
        self.wire_bytes.inc(timings.wire_bytes)
        self.kv_full_bytes.observe(report.kv_bytes_full)
        self.kv_kept_bytes.observe(report.kv_bytes_kept)
        self.state_bytes.inc(report.state_bytes)
        self.computed_ratio.labels(method).observe(report.computed_share)
        self.kv_kept_ratio.labels(method).observe(report.kv_bytes_kept / report.kv_bytes_full)
        self._count_tokens(report, shape)
        self._observe_selection(report, method, shape)

    def _count_tokens(self, report: PrefillReport, shape: ModelShape) -> None:
        num_heads = shape.total_kv_heads
        kept = sum(report.layer_entries) / num_heads
        unpruned = shape.unpruned_entries(report.num_prompt_tokens) / num_heads
        self.tokens_kept.labels("prefill").inc(kept)
        self.tokens_dropped.labels("prefill").inc(unpruned - kept)

    def _observe_selection(self, report: PrefillReport, method: str, shape: ModelShape) -> None:
        layer = report.selection_layer
        if layer is not None:
            self.selection_layer.labels(method).observe(layer)
            self.selection_full_layer.labels(method).observe(shape.place_among_full(layer))
            if layer in (rho := dict(report.rho)):
                self.selection_rho.labels(method).observe(rho[layer])
        if report.no_selection_reason is not None:
            self.no_selection.labels(report.no_selection_reason).inc()
