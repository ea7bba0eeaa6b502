"""SamplingState: what the draw of a sequence's next token depends on, besides its logits."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from winnow.sampling_params import SamplingParams

if TYPE_CHECKING:
    from winnow.grammar.constraint import Constraint  # loads llguidance and transformers

_FIRST_CAPACITY = 64


class TokenCounts:
    """Distinct tokens of a sequence and how often each was generated, as growing arrays."""

    def __init__(self, prompt: Sequence[int]) -> None:
        seen = np.unique(np.asarray(prompt, dtype=np.int64))
        self._size = len(seen)
        self._ids = np.resize(seen, max(_FIRST_CAPACITY, 2 * self._size))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = dict(zip(seen.tolist(), range(self._size), strict=True))

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token_id, self._size)
        if slot == self._size:
            if slot == len(self._ids):
                self._ids = np.resize(self._ids, 2 * slot)
                self._counts = np.resize(self._counts, 2 * slot)
            self._ids[slot], self._counts[slot] = token_id, 0
            self._size += 1
        self._counts[slot] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated; 0 for one that only the prompt has."""
        return self._counts[: self._size]


class SamplingState:
    """A sequence's parameters, its tokens so far and what penalties count of them.

    seed: of the sequence.  prompt_token_ids: only needed if `params.needs_prompt`.
    constraint: what its tokens must match; None: nothing.
    num_unread: tokens after those in `generated` that are sampled, or being sampled, on the device.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        num_prompt_tokens: int,
        prompt_token_ids: Sequence[int] = (),
        constraint: "Constraint | None" = None,
    ) -> None:
        self.params = params
        self.seed = seed
        self.generated: list[int] = []
        self.constraint = constraint
        self.num_unread = 0
        self.counts = TokenCounts(prompt_token_ids) if params.penalizes else None
        bias = params.logit_bias
        self.bias_ids = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self.bias = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self._num_prompt_tokens = num_prompt_tokens

    @property
    def position(self) -> int:
        """Position of the next token to sample: the number of tokens before it."""
        return self._num_prompt_tokens + self.num_drawn

    @property
    def num_drawn(self) -> int:
        """Generated tokens, read or unread."""
        return len(self.generated) + self.num_unread

    @property
    def may_end(self) -> bool:
        """Whether the next token may end the sequence."""
        return self.num_drawn >= self.params.min_tokens

    @property
    def needs_token(self) -> bool:
        """Whether the constraint has to know the token that is unread."""
        return self.constraint is not None and self.num_unread > 0

    @property
    def can_draw_unread(self) -> bool:
        """Whether the next draw needs no token that is unread."""
        return not self.num_unread or self.counts is None

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append generated tokens."""
        for token_id in token_ids:
            self.generated.append(token_id)
            if self.counts is not None:
                self.counts.add(token_id)
