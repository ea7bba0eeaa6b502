"""MaskWorker: computes what grammars allow next, in a thread beside the forward pass."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from winnow.sampling.masks import TokenMasks

if TYPE_CHECKING:
    from winnow.grammar.constraint import Constraint  # loads llguidance and transformers


@dataclass(frozen=True, slots=True, eq=False)
class MaskRow:
    """A row of the batch.  tokens: the sequence's so far.  may_end: whether the next may end it."""

    row: int
    constraint: "Constraint"
    tokens: Sequence[int]
    may_end: bool


class MaskWorker:
    """One thread, which begins with the first row and ends at `close`."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, "winnow-masks")

    def begin(self, rows: Sequence[MaskRow]) -> list[Future[TokenMasks]]:
        """Compute the masks of the rows, if any.  Their tokens must not change meanwhile."""
        return [self._thread.submit(self._fill, rows)] if rows else []

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _fill(self, rows: Sequence[MaskRow]) -> TokenMasks:
        bits = np.empty((len(rows), self._num_words), np.int32)
        for own, one in zip(bits, rows, strict=True):
            one.constraint.advance(one.tokens)
            one.constraint.fill(own, may_end=one.may_end)
        return TokenMasks([one.row for one in rows], bits)
