"""Generated tokens and log-probabilities."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"  # an EOS token, one of `stop_token_ids`, or a stop string
    LENGTH = "length"  # max_tokens, or the model's last position


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under the raw logits, of the chosen token and the top ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of every token of a prompt but the first, which has no prediction.

    logprobs: [num_tokens - 1], each token's.  top_ids, top_logprobs: [num_tokens - 1][k].
    Plain lists, since they are long and are sent between processes.
    """

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    def of_each(self) -> Iterator[TokenLogprobs | None]:
        """The TokenLogprobs of each token in order; None for the first."""
        yield None
        for logprob, ids, values in zip(
            self.logprobs, self.top_ids, self.top_logprobs, strict=True
        ):
            yield TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of sequence `sequence_idx` (0 to n - 1); `finish_reason` on the last."""

    sequence_idx: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
