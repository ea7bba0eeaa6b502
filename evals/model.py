"""What answers an evaluation's prompts, be it in this process or a service."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evals.tasks.base import Example
from evals.variants import Variant


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One example, to be answered under one variant; `length` is the one that was asked for."""

    example: Example
    length: int
    variant: Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStats:
    """What an answer took and what was done to its prompt (fields as in PrefillReport).

    prefill_s: the prompt's own compute.  seconds: until the last token, beside other prompts.
    """

    num_prompt_tokens: int
    num_answer_tokens: int
    selection_layer: int | None
    no_selection_reason: str | None
    rho: tuple[tuple[int, float], ...]
    computed_share: float
    kv_bytes_full: int
    kv_bytes_kept: int
    prefill_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(AnswerStats):
    """A greedy answer."""

    text: str


class Model(Protocol):
    """Prompts go in as token ids, so that every kind of model sees the same ones.

    In a chat the answer's beginning (Example.lead) opens the assistant's turn, as in RULER.
    """

    @property
    def max_positions(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    @property
    def frame_tokens(self) -> int:
        """Tokens that go around a prompt's text: special ones, the chat template's."""

    def identity(self) -> dict[str, Any]:
        """What makes answers comparable; kept with a run, which goes on only with the same."""

    def count(self, text: str) -> int:
        """Tokens of a text, without special ones."""

    def threshold(self, variant: Variant) -> float | None:
        """ASL's threshold under this variant, if it is known."""

    def require_runs(
        self, variants: Sequence[Variant], num_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        """Raise what a prompt and an answer of those lengths would be refused with."""

    def answers(self, instances: Iterable[Instance]) -> Iterator[tuple[Instance, Answer]]:
        """Each instance with its answer as soon as it is there, in any order."""
