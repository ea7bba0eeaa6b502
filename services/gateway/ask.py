"""What one API request asks for, after every check: the same for REST and gRPC."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.limits import Limits
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams
from winnow.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as it came; text is None if it came as token ids."""

    token_ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PromptAsk:
    """One prompt: its tokens, what its answers begin with (`echo`), and their greatest length.

    offsets: where each token begins in `echo`, if their log-probabilities are wanted.
    """

    token_ids: tuple[int, ...]
    echo: str
    max_tokens: int
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. Choice `i * num_choices + j` is the j-th answer to prompt i.

    request_id: unique, what the client sees as the completion's id.
    sampling: for all prompts; its max_tokens gives way to each prompt's own.
    stop to skip_special_tokens: as in TextStream.
    num_prompt_logprobs: as num_logprobs in `sampling`, of the prompts' own tokens.
    """

    request_id: str
    prompts: tuple[PromptAsk, ...]
    num_choices: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    pruning: PruningSettings
    num_prompt_logprobs: int | None = None

    @property
    def most_tokens(self) -> int:
        """Of prompts and the longest answers allowed."""
        return sum(
            len(prompt.token_ids) + self.num_choices * prompt.max_tokens for prompt in self.prompts
        )


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says besides its prompts, before it is checked; None is OpenAI's default.

    max_tokens_param: what the API calls max_tokens. default_max_tokens: None is as many as fit.
    sampling: fields of SamplingParams, without max_tokens.
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


def make_ask(
    id_prefix: str,
    prompts: Sequence[Prompt],
    wishes: Wishes,
    limits: Limits,
    tokenizer: Tokenizer,
) -> Ask:
    """The request's Ask.

    Raises InvalidSetting or PromptTooLong, naming number and limit.
    """
    num_choices = 1 if wishes.n is None else wishes.n
    limits.require_choices(num_choices)
    limits.require_stop(wishes.stop)
    num_prompt_logprobs = wishes.sampling.get("num_logprobs") if wishes.echo else None
    prompt_asks = tuple(_prompt_ask(prompt, wishes, limits, tokenizer) for prompt in prompts)
    shortest = max(1, min(prompt.max_tokens for prompt in prompt_asks))
    return Ask(
        request_id=f"{id_prefix}-{secrets.token_hex(16)}",
        prompts=prompt_asks,
        num_choices=num_choices,
        sampling=_sampling({**wishes.sampling, "max_tokens": shortest}, limits),
        stop=tuple(wishes.stop),
        include_stop_str_in_output=bool(wishes.include_stop_str_in_output),
        skip_special_tokens=wishes.skip_special_tokens is not False,
        pruning=limits.pruning(wishes.pruning, scores_prompt=num_prompt_logprobs is not None),
        num_prompt_logprobs=num_prompt_logprobs,
    )


def _prompt_ask(prompt: Prompt, wishes: Wishes, limits: Limits, tokenizer: Tokenizer) -> PromptAsk:
    max_tokens = limits.max_tokens(
        wishes.max_tokens,
        wishes.default_max_tokens,
        len(prompt.token_ids),
        wishes.max_tokens_param,
        least=0 if wishes.echo else 1,
    )
    token_ids = tuple(prompt.token_ids)
    if not wishes.echo:
        return PromptAsk(token_ids, "", max_tokens)
    echo = tokenizer.decode(token_ids) if prompt.text is None else prompt.text
    scored = wishes.sampling.get("num_logprobs") is not None
    offsets = tokenizer.offsets(token_ids, prompt.text) if scored else ()
    return PromptAsk(token_ids, echo, max_tokens, tuple(offsets))


def _sampling(fields: Mapping[str, Any], limits: Limits) -> SamplingParams:
    """The model's defaults, or OpenAI's, for what is not given; a random seed if none is."""
    given = {name: value for name, value in fields.items() if value is not None}
    given["stop_token_ids"] = limits.stop_token_ids(given.get("stop_token_ids", ()))
    sampling = SamplingParams(**{"seed": secrets.randbits(63), **limits.sampling_defaults, **given})
    limits.require_token_ids(list(sampling.logit_bias), "logit_bias")
    return sampling
