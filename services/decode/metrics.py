"""Prometheus metrics of a decode worker."""

from dataclasses import fields

from services.common.metrics import BATCH_BUCKETS, TOKEN_BUCKETS_S, WorkerMetrics
from winnow.engine.preemption import PreemptionStats
from winnow.errors import ERROR_CODES

IN, OUT = "in", "out"
PREEMPTIONS = tuple(field.name for field in fields(PreemptionStats))


class DecodeMetrics(WorkerMetrics):
    """Metrics of one decode worker. Gauges read the engine at scrape time, so they are current."""

    role = "decode"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._measure_cache()
        self._measure_transfers()
        self._measure_engine()

    def _measure_cache(self) -> None:
        self.pages_total = self._gauge("winnow_kv_pages", "Pages of the pool")
        self.pages_used = self._gauge("winnow_kv_pages_used", "Pages with entries")
        self.pages_reserved = self._gauge(
            "winnow_kv_pages_reserved",
            "Pages promised to admitted requests; with kv_overcommit, of more than there are",
        )
        self.pages_free = self._gauge(
            "winnow_kv_pages_free", "Pages that a request could be promised now"
        )
        self.kv_used_ratio = self._gauge(
            "winnow_kv_used_ratio", "Pages with entries, of all; what a pool is scaled by"
        )
        self.kv_bytes = self._gauge("winnow_kv_resident_bytes", "Keys and values held")
        self.state_bytes = self._gauge(
            "winnow_state_resident_bytes",
            "States of recurrent layers, of every place in the batch, in use or not",
        )
        self.kv_unpruned_bytes = self._gauge(
            "winnow_kv_unpruned_bytes", "Keys and values that the same sequences have unpruned"
        )
        self.recompressions = self._counter(
            "winnow_recompressions", "Times that a sequence was cut back to its decode_budget"
        )
        self.preemptions = self._counter(
            "winnow_kv_preemptions",
            "Sequences that gave way because pages ran short: shrunk to decode_floor, swapped out "
            "to host memory, or given up and computed anew",
            "how",
            PREEMPTIONS,
        )
        self.swapped_sequences = self._gauge(
            "winnow_kv_swapped_sequences", "Sequences that wait in host memory for pages"
        )
        self.swapped_bytes = self._gauge(
            "winnow_kv_swapped_bytes", "Host memory that such sequences take"
        )

    def _measure_transfers(self) -> None:
        self.received_bytes = self._counter(
            "winnow_transfer_received_bytes", "Payload bytes received"
        )
        self.transfers_failed = self._counter(
            "winnow_transfers_failed",
            "Transfers refused or broken, by error code",
            "reason",
            ERROR_CODES,
        )
        self.sequences_moved = self._counter(
            "winnow_sequences_moved",
            "Running sequences that came from another worker, or went to one",
            "direction",
            (IN, OUT),
        )
        self.lease_expiries = self._counter(
            "winnow_lease_expiries", "Reservations whose KV did not come in time"
        )

    def _measure_engine(self) -> None:
        self.running_sequences = self._gauge(
            "winnow_decode_running_sequences", "Sequences in the batch"
        )
        self.waiting_requests = self._gauge(
            "winnow_decode_waiting_requests", "Requests admitted whose KV is not in place"
        )
        self.step_seconds = self._histogram(
            "winnow_decode_step_seconds", "One step of the whole batch", TOKEN_BUCKETS_S
        )
        self.batch_size = self._histogram(
            "winnow_decode_batch_size", "Sequences per step", BATCH_BUCKETS
        )
        self.draining = self._gauge("winnow_draining", "1 while the worker admits nothing more")
