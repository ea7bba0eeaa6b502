"""One answer to a pruned prompt, to be held against the unpruned model.

Nothing is generated again. The unpruned model is given prompt and answer together: what it expects
at each of the answer's positions, given all before it, comes out of a single prefill.
"""

from dataclasses import dataclass, replace

from services.common.jobs import PrefillJob
from services.gateway.request.generation_run import PromptRun
from services.gateway.request.running_request import RunningRequest
from services.gateway.request.states import State
from winnow.adapters.ref import AdapterRef
from winnow.agreement import count_agreeing, kl_lower_bound, same_likeliest
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import MAX_LOGPROBS, SamplingParams
from winnow.tokens import PromptLogprobs, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a check found.

    first_token: whether the likeliest one is the same. num_agreeing: of the `num_tokens` of a
    greedy answer those that the unpruned model gives too; None for an answer that was sampled or
    shaped by penalties and biases, whose tokens need not be the likeliest.
    """

    first_token: bool
    first_kl: float
    num_tokens: int
    num_agreeing: int | None


@dataclass(frozen=True, slots=True)
class QualityCheck:
    """first_logprobs: of the answer's first token, as the pruned prompt had it."""

    request_id: str
    task: str | None
    token_ids: tuple[int, ...]
    answer: tuple[int, ...]
    first_logprobs: TokenLogprobs
    sampling: SamplingParams
    pruning: PruningSettings
    adapter: AdapterRef | None = None
    is_long: bool = False  # as in PrefillJob

    @classmethod
    def of(cls, running: RunningRequest, prompt_idx: int) -> "QualityCheck | None":
        """Of the first answer to a prompt; None unless it was pruned and the answer is whole."""
        run, request = running.runs[prompt_idx], running.request
        first = run.stats.first_logprobs
        if not isinstance(run, PromptRun) or first is None or not run.stats.pruned:
            return None
        if run.state is not State.FINISHED:
            return None
        num_tokens = running.choices_of(prompt_idx)[0].num_tokens
        # Of any other answer only the first token's distribution is compared.
        num_compared = num_tokens if request.sampling.takes_likeliest else 1
        return cls(
            request_id=run.request.request_id,
            task=request.task,
            token_ids=run.request.token_ids,
            answer=tuple(run.answer(0)[:num_compared]),
            first_logprobs=first,
            sampling=request.sampling,
            pruning=request.pruning,
            adapter=request.adapter,
            is_long=run.is_long,
        )

    def job(self, deadline_s: float) -> PrefillJob:
        """The prefill that tells what the unpruned model expects."""
        return PrefillJob(
            request_id=f"{self.request_id}.check",
            attempt=1,
            token_ids=self.token_ids + self.answer,
            pruning=replace(self.pruning, method="full"),
            kv_address=None,
            ticket=None,
            deadline_s=deadline_s,
            num_prompt_logprobs=MAX_LOGPROBS,
            scored_from=len(self.token_ids) - 1,
            gives_way=True,
            adapter=self.adapter,
            is_long=self.is_long,
        )

    def agreement(self, whole: PromptLogprobs, eos_token_ids: frozenset[int]) -> Agreement:
        """whole: the unpruned model's, of the answer's tokens."""
        first = TokenLogprobs(
            whole.logprobs[0], tuple(zip(whole.top_ids[0], whole.top_logprobs[0], strict=True))
        )
        num_agreeing = None
        if self.sampling.takes_likeliest:
            num_agreeing = count_agreeing(self.answer, whole, self.sampling, eos_token_ids)
        return Agreement(
            first_token=same_likeliest(first, self.first_logprobs),
            first_kl=kl_lower_bound(first, self.first_logprobs),
            num_tokens=len(self.answer),
            num_agreeing=num_agreeing,
        )
