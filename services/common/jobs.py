"""What the gateway asks of a prefill worker, and what that answers."""

from dataclasses import dataclass

from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.tokens import PromptLogprobs
from winnow.wire import Ticket


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """One attempt at one prompt's prefill: what the gateway hands to a prefill worker.

    attempt counts from 1; decode refuses frames of an attempt older than one it has seen.
    deadline_s is seconds from the moment the job is received.
    trace_context is the W3C traceparent of the request; empty where it is not traced.
    admitted: an earlier prefill of the request was let in, so this one is not refused for others
    that wait.
    kv_address, ticket: None where nothing is generated, so that nobody wants the KV.
    num_prompt_logprobs: as in SamplingParams, of the prompt's own tokens; needs method `full`.
    scored_from: index of the first token after which log-probabilities are wanted.
    gives_way: it runs only while no other prompt waits or is computed, and ends with Overloaded
    where one comes; nothing counts it.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    pruning: PruningSettings
    kv_address: str | None
    ticket: Ticket | None
    deadline_s: float
    trace_context: str = ""
    admitted: bool = False
    num_prompt_logprobs: int | None = None
    scored_from: int = 0
    gives_way: bool = False


@dataclass(frozen=True, slots=True)
class PrefillTimings:
    """Seconds of one prefill in the service.

    queue_s: waited for the engine. compute_s: forward passes. transfer_s: first frame sent to
    receipt. exposed_transfer_s: from the end of compute to the receipt, what overlap did not hide.
    wire_bytes: bytes of all frames.
    """

    queue_s: float
    compute_s: float
    transfer_s: float
    exposed_transfer_s: float
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a prefill worker answers when an attempt's KV is in place, or was not wanted."""

    report: PrefillReport
    timings: PrefillTimings
    prompt_logprobs: PromptLogprobs | None = None
