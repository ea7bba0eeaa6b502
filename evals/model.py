"""The interface of models under evaluation, in this process or behind a service."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evals.tasks.base import Example
from evals.variants import Variant


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One example to answer under one variant; `length` is the requested prompt length."""

    example: Example
    length: int
    variant: Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStats:
    """Cost of an answer, and the pruning of its prompt (fields as in PrefillReport).

    prefill_s: prefill time of the prompt.  seconds: until the last token, other prompts' included.
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
    """A model under evaluation. Prompts are passed as token ids, so that all models see the same.

    In a chat, the beginning of the answer (Example.lead) opens the assistant's turn, as in RULER.
    """

    @property
    def max_positions(self) -> int:
        """The most tokens of a prompt and its answer together."""

    @property
    def frame_tokens(self) -> int:
        """Tokens added to a prompt's text: special tokens and the chat template's."""

    def identity(self) -> dict[str, Any]:
        """What answers depend on; stored with a run, which can only be resumed with the same."""

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""

    def threshold(self, variant: Variant) -> float | None:
        """ASL's threshold under this variant, if known."""

    def require_runs(
        self, variants: Sequence[Variant], num_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        """Raise the error that a prompt and an answer of these lengths would be refused with."""

    def answers(self, instances: Iterable[Instance]) -> Iterator[tuple[Instance, Answer]]:
        """Yield each instance with its answer as soon as it is available, in any order."""
