"""Sampling parameters and stop conditions of a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from winnow.checks import MAX_COUNT, require_range

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is sampled, and when to stop.

    temperature 0 is greedy; top_k 0 and top_p 1 disable those filters; num_logprobs None gives no
    log-probabilities, 0 only the sampled token's, k also those of the k likeliest tokens.
    stop_token_ids: tokens that end the completion besides the model's EOS tokens.
    min_tokens: before this many tokens no stop token or EOS is sampled, and stop strings are
    ignored.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    num_logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        require_range("max_tokens", self.max_tokens, 1, MAX_COUNT)
        require_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        require_range("temperature", self.temperature, 0, 2)
        require_range("top_p", self.top_p, 0, 1, low_open=True)
        require_range("top_k", self.top_k, 0, MAX_COUNT)
        require_range("min_p", self.min_p, 0, 1)
        require_range("seed", self.seed, 0, 2**63 - 1)
        require_range("presence_penalty", self.presence_penalty, -2, 2)
        require_range("frequency_penalty", self.frequency_penalty, -2, 2)
        require_range("repetition_penalty", self.repetition_penalty, 0, 10, low_open=True)
        require_range("logit_bias", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for bias in self.logit_bias.values():
            require_range("logit_bias", bias, -100, 100)
        if self.num_logprobs is not None:
            require_range("logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        require_range("stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)

    @property
    def needs_prompt(self) -> bool:
        """Whether sampling needs the prompt's token ids."""
        return self.repetition_penalty != 1.0

    @property
    def penalizes(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        penalties = self.presence_penalty or self.frequency_penalty
        return bool(penalties) or self.repetition_penalty != 1

    @property
    def filters(self) -> bool:
        """Whether min-p, top-k or top-p excludes tokens."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1

    @property
    def takes_likeliest(self) -> bool:
        """True if each token is the one that the model itself gives the highest logit."""
        return self.temperature == 0 and not self.penalizes and not self.logit_bias

    def ends(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end a completion, given the model's EOS tokens."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids
