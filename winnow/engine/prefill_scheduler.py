"""Which of several prompts computes its next layer: the one with the least work left, aged.

Work is counted in layer-tokens: one token in one layer. Least work first makes short prompts quick
and long ones wait. So the oldest prompt ages: when others have computed PATIENCE times its next
layer since it last went on, it goes on, whatever its length. It is thereby sure of a share
1 / (1 + PATIENCE) of the engine until it ends, and then the next one is the oldest. Others never
wait for more than one layer of it at a time. Only one prompt ages: if all did, equally long ones
would take turns, and all would end as late as the last.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

PATIENCE = 3


class Prompt(Protocol):
    """What the scheduler sees of a prompt."""

    @property
    def is_open(self) -> bool:
        """Whether it has begun, and so holds its hidden states."""

    @property
    def can_go_on(self) -> bool:
        """False while its last layers have not left yet."""

    @property
    def next_layer_tokens(self) -> int:
        """Tokens that its next layer computes."""

    @property
    def layer_tokens_left(self) -> int:
        """Tokens of all layers that it has still to compute, as far as is known."""


P = TypeVar("P", bound=Prompt)


class PrefillScheduler(Generic[P]):
    """max_open: a prompt waits to begin while this many are open."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._oldest: P | None = None
        self._passed_over = 0  # layer-tokens computed since the oldest last went on

    def choose(self, prompts: Sequence[P]) -> P:
        """The prompt that computes its next layer now.

        prompts: all that have not ended, in order of arrival; at least one.
        """
        oldest = prompts[0]
        if oldest is not self._oldest:
            self._oldest, self._passed_over = oldest, 0
        may_begin = sum(prompt.is_open for prompt in prompts) < self._max_open
        allowed = [prompt for prompt in prompts if prompt.is_open or may_begin]
        ready = [prompt for prompt in allowed if prompt.can_go_on] or allowed
        if ready[0] is oldest and self._passed_over >= PATIENCE * oldest.next_layer_tokens:
            return oldest
        return min(ready, key=lambda prompt: prompt.layer_tokens_left)  # of equals, the oldest

    def record(self, prompt: P, layer_tokens: int) -> None:
        """Note that `prompt`, the one chosen last, has computed a layer of so many tokens."""
        self._passed_over = 0 if prompt is self._oldest else self._passed_over + layer_tokens
