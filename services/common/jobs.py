"""Messages between the gateway and prefill workers: a job and its outcome."""

from dataclasses import dataclass

from winnow.adapters.ref import AdapterRef, kv_variant
from winnow.pruning_settings import PruningSettings
from winnow.report import PrefillReport
from winnow.token_scores import TokenScores
from winnow.tokens import PromptLogprobs
from winnow.versions import set_fields
from winnow.wire import Ticket


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """One attempt to prefill one prompt, sent by the gateway to a prefill worker.

    attempt: from 1; decode refuses frames of an attempt older than one it has seen.
    deadline_s: seconds from the moment the job is received.
    trace_context: W3C traceparent of the request; empty if it is not traced.
    admitted: an earlier prefill of the request was accepted, so a full queue does not refuse this.
    kv_address, ticket: None if nothing is generated, so that no KV is sent.
    num_prompt_logprobs: as in SamplingParams, for the prompt's tokens; needs method `full`.
    scored_from: index of the first token after which log-probabilities are wanted.
    gives_way: it runs only while no other prompt waits or is computed, and ends with Overloaded
    when one arrives; no metric counts it.
    cache_salt: prompts with another one do not share the prefix cache with it.
    rank_kv_addresses: where each rank of the decode worker takes the KV of its heads; empty if all
    goes to kv_address.
    explains: the outcome is to have `scores`.
    adapter: that computes the prompt; None: the model alone does.
    is_long: whether it is rotated by the model's long tables (ModelDescription.is_long).
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
    cache_salt: str = ""
    rank_kv_addresses: tuple[str, ...] = ()
    explains: bool = False
    adapter: AdapterRef | None = None
    is_long: bool = False

    __setstate__ = set_fields

    @property
    def kv_variant(self) -> str | None:
        """What tells its KV from the model's other ones."""
        return kv_variant(self.adapter, is_long=self.is_long)


@dataclass(frozen=True, slots=True)
class PrefillTimings:
    """Timings of one prefill in the service, in seconds.

    queue_s: waiting for the engine, before the first layer and between two. compute_s: forward
    passes. transfer_s: first frame sent until receipt. exposed_transfer_s: end of compute until
    receipt, not hidden by overlap. wire_bytes: bytes of all frames.
    """

    queue_s: float
    compute_s: float
    transfer_s: float
    exposed_transfer_s: float
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """A prefill worker's response once an attempt's KV is in place, or was not requested.

    scores: None if they were not requested, or the worker is too old to have them.
    """

    report: PrefillReport
    timings: PrefillTimings
    prompt_logprobs: PromptLogprobs | None = None
    scores: TokenScores | None = None

    __setstate__ = set_fields
