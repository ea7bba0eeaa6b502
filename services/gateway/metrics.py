"""Prometheus metrics of the gateway: requests, tokens and latencies as clients see them."""

from collections.abc import Iterable

from services.common.metrics import (
    COUNT_BUCKETS,
    RATIO_BUCKETS,
    REQUEST_BUCKETS_S,
    TOKEN_BUCKETS_S,
    Metrics,
)
from services.gateway.request.states import ADMISSION, PREFILL, WORKER_LOST
from winnow.errors import ERROR_CODES

OTHER_TASK = "other"  # a request's task that is not one of the operator's
MAX_ADAPTER_LABELS = 64  # the first that are asked for; more are counted as OTHER_ADAPTER
OTHER_ADAPTER = "other"
CHECK_OUTCOMES = ("done", "dropped", "failed")
KL_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FINISH_REASONS = ("stop", "length", "error", "cancelled")


class GatewayMetrics(Metrics):
    """Metrics of one gateway. A request with several prompts counts once per prompt.

    tasks: label values of the quality checks.  adapters: those known at the start.
    """

    role = "gateway"

    def __init__(self, model: str, tasks: Iterable[str] = (), adapters: Iterable[str] = ()) -> None:
        super().__init__(model)
        self._count_requests()
        self._count_tokens()
        self._time_requests()
        self._count_checks({*tasks, OTHER_TASK})
        self._count_adapters(adapters)
        self.decode_workers = self._gauge(
            "winnow_decode_workers", "Live decode workers that requests can be routed to"
        )
        self.incompatible_workers = self._gauge(
            "winnow_incompatible_decode_workers",
            "Live decode workers of another model, or without a common wire version",
        )

    def _count_requests(self) -> None:
        self.requests_received = self._counter(
            "winnow_requests_received", "Prompts accepted for completion"
        )
        self.requests_admitted = self._counter(
            "winnow_requests_admitted", "Prompts for which a decode worker reserved KV memory"
        )
        self.requests_finished = self._counter(
            "winnow_requests_finished", "Prompts ended, by reason", "reason", FINISH_REASONS
        )
        self.requests_refused = self._counter(
            "winnow_requests_refused",
            "Requests answered with an error instead of tokens, by error code",
            "reason",
            ERROR_CODES,
        )
        self.requests_running = self._gauge(
            "winnow_requests_running", "Prompts accepted and not ended"
        )
        self.requests_waiting = self._gauge(
            "winnow_requests_waiting",
            "Prompts accepted whose KV is not in place, by what they wait for",
            "reason",
            (ADMISSION, PREFILL),
        )
        self.prefill_retries = self._counter("winnow_prefill_retries", "Prefills tried again")
        self.migrations = self._counter(
            "winnow_migrations",
            "Prompts computed anew for another decode worker, by what befell the first",
            "reason",
            (error.code for error in WORKER_LOST),
        )
        self.move_seconds = self._histogram(
            "winnow_move_seconds",
            "From a draining decode worker's last token of a prompt until another one has all "
            "that it held",
            REQUEST_BUCKETS_S,
        )

    def _count_tokens(self) -> None:
        self.prompt_tokens = self._counter("winnow_prompt_tokens", "Tokens of accepted prompts")
        self.generated_tokens = self._counter("winnow_generated_tokens", "Tokens generated")
        self.request_prompt_tokens = self._histogram(
            "winnow_request_prompt_tokens", "Tokens per prompt", COUNT_BUCKETS
        )
        self.request_generated_tokens = self._histogram(
            "winnow_request_generated_tokens", "Tokens generated per prompt", COUNT_BUCKETS
        )

    def _count_adapters(self, adapters: Iterable[str]) -> None:
        self._adapter_labels = set(sorted(adapters)[:MAX_ADAPTER_LABELS])
        known = {*self._adapter_labels, OTHER_ADAPTER}
        self.adapter_requests = self._counter(
            "winnow_adapter_requests", "Prompts accepted for an adapter", "adapter", known
        )
        self.adapter_prompt_tokens = self._counter(
            "winnow_adapter_prompt_tokens", "Tokens of prompts for an adapter", "adapter", known
        )
        self.adapter_generated_tokens = self._counter(
            "winnow_adapter_generated_tokens", "Tokens that an adapter generated", "adapter", known
        )

    def adapter_label(self, name: str) -> str:
        """The label value of an adapter: its name, or OTHER_ADAPTER if there are too many."""
        if len(self._adapter_labels) < MAX_ADAPTER_LABELS:
            self._adapter_labels.add(name)
        return name if name in self._adapter_labels else OTHER_ADAPTER

    def _time_requests(self) -> None:
        self.admission_seconds = self._histogram(
            "winnow_admission_seconds",
            "From a prompt's arrival to its reservation of KV memory",
            REQUEST_BUCKETS_S,
        )
        self.ttft = self._histogram(
            "winnow_ttft_seconds", "From a prompt's arrival to its first token", REQUEST_BUCKETS_S
        )
        self.inter_token = self._histogram(
            "winnow_inter_token_seconds", "Between two tokens of one sequence", TOKEN_BUCKETS_S
        )
        self.time_per_output_token = self._histogram(
            "winnow_time_per_output_token_seconds",
            "From a prompt's first token to its last, per token after the first",
            TOKEN_BUCKETS_S,
        )
        self.request_seconds = self._histogram(
            "winnow_request_seconds", "From a prompt's arrival to its end", REQUEST_BUCKETS_S
        )

    def _count_checks(self, tasks: set[str]) -> None:
        """Of answers to pruned prompts, against the unpruned model: services/gateway/quality."""
        self.quality_checks = self._counter(
            "winnow_quality_checks",
            "Answers to pruned prompts picked for a check, by what became of it",
            "outcome",
            CHECK_OUTCOMES,
        )
        self.quality_first_tokens = self._counter(
            "winnow_quality_first_tokens", "First tokens of checked answers", "task", tasks
        )
        self.quality_first_tokens_agreed = self._counter(
            "winnow_quality_first_tokens_agreed",
            "Checked answers whose likeliest first token is the unpruned model's likeliest",
            "task",
            tasks,
        )
        self.quality_answers = self._counter(
            "winnow_quality_answers", "Checked greedy answers", "task", tasks
        )
        self.quality_answers_agreed = self._counter(
            "winnow_quality_answers_agreed",
            "Checked greedy answers that are the unpruned model's, token for token",
            "task",
            tasks,
        )
        self.quality_tokens_agreed = self._histogram(
            "winnow_quality_tokens_agreed_ratio",
            "Tokens of a checked greedy answer that the unpruned model gives as well, of all",
            RATIO_BUCKETS,
            "task",
            tasks,
        )
        self.quality_first_kl = self._histogram(
            "winnow_quality_first_kl_nats",
            "KL divergence of a checked answer's first token, unpruned from pruned, at least",
            KL_BUCKETS,
            "task",
            tasks,
        )
