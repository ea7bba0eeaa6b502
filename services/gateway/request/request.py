"""A validated API request, the same for REST and gRPC."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.access.request_limits import RequestLimits
from winnow.adapters.ref import AdapterRef
from winnow.answers import AnswerFormat
from winnow.errors import InvalidSetting
from winnow.grammar import Grammar
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import MAX_LOGPROBS, SamplingParams
from winnow.tokenizer import Tokenizer

MAX_EXPLAINED_TOKENS = 262_144


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as received; text is None if it came as token IDs."""

    token_ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """One prompt: its tokens, the text its answers begin with (`echo`), and their max_tokens.

    offsets: where each token begins in `echo`, if prompt log-probabilities are requested.
    """

    token_ids: tuple[int, ...]
    echo: str
    max_tokens: int
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request. Choice `i * num_choices + j` is the j-th answer to prompt i.

    request_id: unique; the completion's id in the API.
    sampling: shared by all prompts, except that each has its own max_tokens.
    stop, include_stop_str_in_output, skip_special_tokens: as in TextStream.
    num_prompt_logprobs: num_logprobs of `sampling`, for the prompts' tokens.
    task: the client's name for it, in metrics of quality. is_sampled: a quality check follows.
    verified_by: settings under which its only prompt is run a second time, to compare the answers.
    cache_salt: the client's; the prefix store sees `Access.cache_salt`.
    grammar: what every answer must match. answer: what its text has parts of; None: all is text.
    explains: the usage says what was dropped of the prompt.
    model_name: the name under which the client asked for the model.
    adapter: the one that this name is of; None: the model itself.
    """

    request_id: str
    prompts: tuple[CheckedPrompt, ...]
    num_choices: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    pruning: PruningSettings
    num_prompt_logprobs: int | None = None
    task: str | None = None
    is_sampled: bool = False
    verified_by: PruningSettings | None = None
    cache_salt: str | None = None
    grammar: Grammar | None = None
    answer: AnswerFormat | None = None
    explains: bool = False
    model_name: str | None = None
    adapter: AdapterRef | None = None

    @property
    def runs(self) -> tuple[tuple[CheckedPrompt, PruningSettings], ...]:
        """What is run: every prompt, then once more the one to verify."""
        runs = tuple((prompt, self.pruning) for prompt in self.prompts)
        if self.verified_by is None:
            return runs
        return (*runs, (self.prompts[0], self.verified_by))

    @property
    def num_answers(self) -> int:
        """Choices that the client sees."""
        return len(self.prompts) * self.num_choices

    @property
    def decode_logprobs(self) -> int | None:
        """The num_logprobs to ask decode for: more than the client's where it is compared."""
        compared = self.is_sampled or self.verified_by is not None
        return MAX_LOGPROBS if compared else self.sampling.num_logprobs

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompts and of their longest allowed answers."""
        return sum(
            len(prompt.token_ids) + self.num_choices * prompt.max_tokens for prompt, _ in self.runs
        )


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of a request before validation; None means OpenAI's default.

    max_tokens_param: the API's name for max_tokens. default_max_tokens: None for as many as fit.
    sampling: fields of SamplingParams except max_tokens.
    """

    max_tokens: int | None
    max_tokens_param: str
    default_max_tokens: int | None
    n: int | None
    stop: Sequence[str]
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    echo: bool
    sampling: Mapping[str, Any]
    pruning: Mapping[str, Any]
    task: str | None = None
    verify: bool = False
    cache_salt: str | None = None
    grammar: Grammar | None = None
    answer: AnswerFormat | None = None
    explains: bool = False
    model_name: str | None = None
    adapter: AdapterRef | None = None


def checked_request(
    id_prefix: str,
    prompts: Sequence[Prompt],
    options: RequestOptions,
    limits: RequestLimits,
    tokenizer: Tokenizer,
) -> GenerationRequest:
    """Validate a request's prompts and options.

    Raises InvalidSetting or PromptTooLong, with the number and the limit.
    """
    num_choices = 1 if options.n is None else options.n
    limits.require_choices(num_choices)
    limits.require_stop(options.stop)
    limits.require_cache_salt(options.cache_salt)
    if options.grammar is not None and options.sampling.get("ignore_eos"):
        raise InvalidSetting(
            "ignore_eos is true, but an answer that matches a grammar ends", param="ignore_eos"
        )
    num_prompt_logprobs = options.sampling.get("num_logprobs") if options.echo else None
    checked = tuple(_checked_prompt(prompt, options, limits, tokenizer) for prompt in prompts)
    shortest = max(1, min(prompt.max_tokens for prompt in checked))
    pruning = limits.pruning(options.pruning, scores_prompt=num_prompt_logprobs is not None)
    if options.verify:
        _require_verifiable(checked, num_choices, scores_prompt=num_prompt_logprobs is not None)
    if options.explains:
        _require_explainable(checked)
    return GenerationRequest(
        request_id=f"{id_prefix}{secrets.token_hex(16)}",
        prompts=checked,
        num_choices=num_choices,
        sampling=_sampling({**options.sampling, "max_tokens": shortest}, limits),
        stop=tuple(options.stop),
        include_stop_str_in_output=bool(options.include_stop_str_in_output),
        skip_special_tokens=options.skip_special_tokens is not False,
        pruning=pruning,
        num_prompt_logprobs=num_prompt_logprobs,
        task=options.task,
        verified_by=limits.verifying(pruning) if options.verify else None,
        cache_salt=options.cache_salt,
        grammar=options.grammar,
        answer=options.answer,
        explains=options.explains,
        model_name=options.model_name,
        adapter=options.adapter,
    )


def _require_verifiable(
    prompts: Sequence[CheckedPrompt], num_choices: int, *, scores_prompt: bool
) -> None:
    """Raises InvalidSetting unless there is one answer, to a prompt that may be pruned."""
    fault = None
    if len(prompts) > 1:
        fault = f"the request has {len(prompts)} prompts"
    elif num_choices > 1:
        fault = f"n is {num_choices}"
    elif prompts[0].max_tokens == 0:
        fault = "max_tokens is 0"
    elif scores_prompt:
        fault = "echo with logprobs computes the prompt unpruned"
    if fault is not None:
        message = f"verify compares one answer to a pruned prompt with the unpruned one; {fault}"
        raise InvalidSetting(message, param="winnow.verify")


def _require_explainable(prompts: Sequence[CheckedPrompt]) -> None:
    """Raises InvalidSetting unless there is one prompt, short enough to tell of each token."""
    fault = None
    if len(prompts) > 1:
        fault = f"the request has {len(prompts)} prompts; the limit is 1"
    elif len(prompts[0].token_ids) > MAX_EXPLAINED_TOKENS:
        num_tokens = len(prompts[0].token_ids)
        fault = f"the prompt has {num_tokens:,} tokens; the limit is {MAX_EXPLAINED_TOKENS:,}"
    if fault is not None:
        message = f"explain tells of every token of one prompt: {fault}"
        raise InvalidSetting(message, param="winnow.explain")


def _checked_prompt(
    prompt: Prompt, options: RequestOptions, limits: RequestLimits, tokenizer: Tokenizer
) -> CheckedPrompt:
    max_tokens = limits.max_tokens(
        options.max_tokens,
        options.default_max_tokens,
        len(prompt.token_ids),
        options.max_tokens_param,
        least=0 if options.echo else 1,
    )
    token_ids = tuple(prompt.token_ids)
    if not options.echo:
        return CheckedPrompt(token_ids, "", max_tokens)
    echo = tokenizer.decode(token_ids) if prompt.text is None else prompt.text
    scored = options.sampling.get("num_logprobs") is not None
    offsets = tokenizer.offsets(token_ids, prompt.text) if scored else ()
    return CheckedPrompt(token_ids, echo, max_tokens, tuple(offsets))


def _sampling(fields: Mapping[str, Any], limits: RequestLimits) -> SamplingParams:
    """Given fields, over the model's defaults, over OpenAI's; a random seed if none is given."""
    given = {name: value for name, value in fields.items() if value is not None}
    given["stop_token_ids"] = limits.stop_token_ids(given.get("stop_token_ids", ()))
    sampling = SamplingParams(**{"seed": secrets.randbits(63), **limits.sampling_defaults, **given})
    limits.require_token_ids(list(sampling.logit_bias), "logit_bias")
    return sampling
