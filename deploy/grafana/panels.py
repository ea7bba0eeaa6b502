"""What the dashboards show: panels in rows, each with a title, a sentence, a unit and queries."""

from dataclasses import dataclass

from deploy.grafana.queries import gauge, mean, quantiles, rate, ratio

SECONDS, BYTES, SHARE, COUNT, RATE = "s", "bytes", "percentunit", "short", "cps"
TOKENS, TOKEN_RATE, BYTE_RATE = "short", "suffix: tokens/s", "Bps"
PROCESS = "role, instance"


@dataclass(frozen=True)
class Panel:
    """One panel: `queries` by legend; values turn orange and red at `limits`, red below `floor`."""

    title: str
    meaning: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    limits: tuple[float, float] | None = None
    floor: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    rows: dict[str, list[Panel]]


SERVICE = Dashboard(
    "winnow-service",
    "Winnow: service",
    {
        "Now": [
            Panel("Requests", "Prompts ended per second", RATE,
                  rate("winnow_requests_finished_total"), "stat"),
            Panel("Running", "Prompts accepted and not ended", COUNT,
                  gauge("winnow_requests_running"), "stat"),
            Panel("Decode workers", "Live decode workers that requests can be routed to", COUNT,
                  gauge("winnow_decode_workers", of="max"), "stat", floor=1),
        ],
        "Traffic": [
            Panel("Ended, by reason", "How prompts ended", RATE,
                  rate("winnow_requests_finished_total", "reason"), stacked=True),
            Panel("Refused, by reason", "Errors instead of tokens, by code", RATE,
                  rate("winnow_requests_refused_total", "reason"), limits=(0.1, 1), stacked=True),
            Panel("Tokens", "Tokens per second", TOKEN_RATE,
                  rate("winnow_prompt_tokens_total", name="prompt")
                  | rate("winnow_generated_tokens_total", name="generated")),
        ],
        "Latency": [
            Panel("Time to first token", "From a prompt's arrival to its first token", SECONDS,
                  quantiles("winnow_ttft_seconds"), limits=(2.048, 4.096)),
            Panel("Between tokens", "Between two tokens of one sequence", SECONDS,
                  quantiles("winnow_inter_token_seconds"), limits=(0.16, 0.32)),
            Panel("Time per output token", "After the first, averaged over a prompt", SECONDS,
                  quantiles("winnow_time_per_output_token_seconds")),
            Panel("End to end", "From a prompt's arrival to its end", SECONDS,
                  quantiles("winnow_request_seconds")),
        ],
        "Queue and saturation": [
            Panel("Waiting", "Prompts without their KV in place, by what they wait for", COUNT,
                  gauge("winnow_requests_waiting", "reason"), limits=(8, 64), stacked=True),
            Panel("Time in queue", "99th percentiles of the two waits", SECONDS,
                  quantiles("winnow_admission_seconds", "", (0.99,), "for KV memory")
                  | quantiles("winnow_prefill_queue_seconds", "", (0.99,),
                              "for the prefill engine")),
            Panel("Prompt tokens waiting for prefill", "What is ahead of a new prompt", TOKENS,
                  gauge("winnow_prefill_waiting_tokens")),
            Panel("KV pool promised", "To admitted requests, of all that can be promised now",
                  SHARE,
                  {"": "sum(winnow_kv_pages_reserved{@}) / "
                   "(sum(winnow_kv_pages_reserved{@}) + sum(winnow_kv_pages_free{@}))"},
                  limits=(0.8, 0.95)),
            Panel("Gave way for want of KV memory", "Sequences shrunk to decode_floor, swapped out "
                  "to host memory, or given up", RATE,
                  rate("winnow_kv_preemptions_total", "how"), limits=(0.1, 1), stacked=True),
            Panel("Waiting in host memory", "KV of sequences that were swapped out", BYTES,
                  gauge("winnow_kv_swapped_bytes")),
            Panel("Prefills tried again", "After a failure that another worker may not have", RATE,
                  rate("winnow_prefill_retries_total")),
            Panel("Computed anew at another decode worker", "Prompts whose decode worker was lost, "
                  "by what befell it", RATE,
                  rate("winnow_migrations_total", "reason"), limits=(0.01, 0.1), stacked=True),
            Panel("Moved to another decode worker", "Sequences that went on elsewhere with their "
                  "KV, because their worker drained", RATE,
                  rate("winnow_sequences_moved_total", "direction")),
            Panel("Prompt lengths", "Tokens per prompt", TOKENS,
                  quantiles("winnow_request_prompt_tokens")),
        ],
    },
)  # fmt: skip

KV = Dashboard(
    "winnow-kv",
    "Winnow: KV and pruning",
    {
        "Memory": [
            Panel("KV held", "Keys and values that decode holds, and what the same sequences "
                  "would take unpruned", BYTES,
                  gauge("winnow_kv_resident_bytes", name="held")
                  | gauge("winnow_kv_unpruned_bytes", name="unpruned")),
            Panel("Sent, of all KV", "Prompts' keys and values that prefill sent", SHARE,
                  mean("winnow_kv_kept_ratio", "method")),
            Panel("KV pool in use, by worker", "Pages with entries, of all", SHARE,
                  gauge("winnow_kv_used_ratio", "instance"), limits=(0.8, 0.95)),
            Panel("KV held, by worker", "Keys and values", BYTES,
                  gauge("winnow_kv_resident_bytes", "instance")),
        ],
        "Selection": [
            Panel("Selection layer", "After which only selected tokens went on", COUNT,
                  {"{{le}}": "sum by (le) (increase("
                   "winnow_selection_layer_bucket{@}[$__rate_interval]))"}, "heatmap"),
            Panel("Layer-tokens computed", "Of all, by method", SHARE,
                  mean("winnow_computed_ratio", "method")),
            Panel("Rank variance at selection", "ρ at the layer that ASL chose", COUNT,
                  quantiles("winnow_selection_rho")),
            Panel("Not selected, by reason", "Prompts that all their tokens went through", RATE,
                  rate("winnow_no_selection_total", "reason"), stacked=True),
            Panel("Tokens kept and dropped", "Of which KV was kept or dropped", TOKEN_RATE,
                  rate("winnow_tokens_kept_total", "stage", "kept in")
                  | rate("winnow_tokens_dropped_total", "stage", "dropped in")),
            Panel("Recompressions", "Sequences cut back to their decode_budget", RATE,
                  rate("winnow_recompressions_total", "instance")),
        ],
        "Prefix store": [
            Panel("Taken from the store", "Of the prompts' tokens those that were not computed in "
                  "layer 0, by worker", SHARE,
                  ratio("winnow_prefix_hit_tokens_total", "winnow_prefix_looked_up_tokens_total",
                        "instance")),
            Panel("Tokens looked up and found", "Of prompts whose method can use the store",
                  TOKEN_RATE,
                  rate("winnow_prefix_looked_up_tokens_total", name="looked up")
                  | rate("winnow_prefix_hit_tokens_total", name="found")),
            Panel("Memory in use, by worker", "Of prefix_cache_bytes; a store that has been used "
                  "for a while is full", BYTES,
                  gauge("winnow_prefix_resident_bytes", "instance")
                  | gauge("winnow_prefix_limit_bytes", "instance", "limit")),
            Panel("Blocks, by worker", "Consecutive tokens of prompts that begin alike", COUNT,
                  gauge("winnow_prefix_blocks", "instance")),
            Panel("Evicted, by worker", "Blocks given up for want of memory", RATE,
                  rate("winnow_prefix_evicted_blocks_total", "instance")),
            Panel("Damaged, by worker", "Blocks that failed their checksum, and were computed "
                  "anew", RATE,
                  rate("winnow_prefix_damaged_blocks_total", "instance"), limits=(0.001, 0.01)),
        ],
        "Quality in use": [
            Panel("First tokens as unpruned", "Of checked answers in six hours those whose "
                  "likeliest first token is the unpruned model's, by task; nothing without "
                  "quality_sample", SHARE,
                  ratio("winnow_quality_first_tokens_agreed_total",
                        "winnow_quality_first_tokens_total", "task", "6h")),
            Panel("Tokens as unpruned", "Of checked greedy answers in six hours: tokens that the "
                  "unpruned model gives as well, mean over answers", SHARE,
                  mean("winnow_quality_tokens_agreed_ratio", "task", "6h")),
            Panel("Answers as unpruned", "Of checked greedy answers in six hours those that are "
                  "the unpruned model's, token for token", SHARE,
                  ratio("winnow_quality_answers_agreed_total", "winnow_quality_answers_total",
                        "task", "6h")),
            Panel("Divergence of the first token", "KL divergence, unpruned from pruned, in nats, "
                  "at least; over six hours", COUNT,
                  quantiles("winnow_quality_first_kl_nats", "task", (0.5, 0.9), window="6h")),
            Panel("Checks", "Sampled answers, by what became of the check", RATE,
                  rate("winnow_quality_checks_total", "outcome"), stacked=True),
        ],
        "Transfer": [
            Panel("Throughput", "Bytes of all frames", BYTE_RATE,
                  rate("winnow_wire_bytes_total", "instance")),
            Panel("Transfer time", "First frame to receipt", SECONDS,
                  quantiles("winnow_transfer_seconds", "instance")),
            Panel("Exposed transfer time", "What compute did not hide", SECONDS,
                  quantiles("winnow_exposed_transfer_seconds", "instance"), limits=(0.5, 2)),
            Panel("In flight", "Transfers begun and not ended", COUNT,
                  gauge("winnow_transfers_in_flight", PROCESS)),
            Panel("Failed, by reason", "Transfers refused or broken", RATE,
                  rate("winnow_transfers_failed_total", "reason"), limits=(0.01, 0.1),
                  stacked=True),
            Panel("Leases expired", "Reservations whose KV did not come in time", RATE,
                  rate("winnow_lease_expiries_total"), limits=(0.01, 0.1)),
        ],
    },
)  # fmt: skip

WORKERS = Dashboard(
    "winnow-workers",
    "Winnow: workers",
    {
        "Processes": [
            Panel("Alive", "1 where a process answers", COUNT,
                  gauge("winnow_build_info", PROCESS)),
            Panel("CPU", "Cores in use", COUNT, rate("process_cpu_seconds_total", PROCESS)),
            Panel("Memory", "Resident", BYTES, gauge("process_resident_memory_bytes", PROCESS)),
            Panel("GPU memory", "Of tensors; 0 on a CPU", BYTES,
                  gauge("winnow_device_memory_bytes", PROCESS)),
        ],
        "Prefill": [
            Panel("Waiting and open", "Prompts waiting to begin; begun and not ended", COUNT,
                  gauge("winnow_prefill_waiting", "instance", "waiting")
                  | gauge("winnow_prefill_open", "instance", "open")),
            Panel("Oldest prompt", "Time since it came; it is not computed yet", SECONDS,
                  gauge("winnow_prefill_oldest_seconds", "instance", of="max")),
            Panel("Compute", "Forward passes of one prompt", SECONDS,
                  quantiles("winnow_prefill_compute_seconds", "instance")),
            Panel("Layer", "One layer of one prompt", SECONDS,
                  quantiles("winnow_prefill_layer_seconds", "instance")),
            Panel("Failures, by reason", "Prefills begun and not delivered", RATE,
                  rate("winnow_prefill_failures_total", "reason"), stacked=True),
        ],
        "Decode": [
            Panel("Step", "One step of the whole batch", SECONDS,
                  quantiles("winnow_decode_step_seconds", "instance")),
            Panel("Batch", "Sequences per step", COUNT,
                  mean("winnow_decode_batch_size", "instance")),
            Panel("Running and waiting", "Sequences in the batch; requests whose KV is not in "
                  "place", COUNT,
                  gauge("winnow_decode_running_sequences", "instance", "running")
                  | gauge("winnow_decode_waiting_requests", "instance", "waiting")),
            Panel("Pages in use", "Pages with entries, of all", SHARE,
                  {"{{instance}}": "sum by (instance) (winnow_kv_pages_used{@}) "
                   "/ sum by (instance) (winnow_kv_pages{@})"}, limits=(0.8, 0.95)),
            Panel("KV received", "Payload from prefill", BYTE_RATE,
                  rate("winnow_transfer_received_bytes_total", "instance")),
            Panel("Draining", "1 while a worker admits nothing more", COUNT,
                  gauge("winnow_draining", "instance")),
        ],
    },
)  # fmt: skip

DASHBOARDS = (SERVICE, KV, WORKERS)
