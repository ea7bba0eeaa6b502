"""Cut: which tokens of each row the filters keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.sampling.blocks import block_sums, chunks
from winnow.sampling.masses import block_masses


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Keeps logits above `threshold`, and the first `num_ties` of those equal to it.

    weight: of one token at the threshold, 1 of the likeliest.  All are [R, 1]; num_ties is float64
    and may be inf.
    has_ties: false if num_ties is 0 in every row.
    """

    threshold: Tensor
    weight: Tensor
    num_ties: Tensor
    has_ties: bool = True

    @classmethod
    def joined(cls, cuts: Sequence["Cut"]) -> "Cut":
        """The cut of all rows, from those of some each."""
        return cls(
            torch.cat([one.threshold for one in cuts]),
            torch.cat([one.weight for one in cuts]),
            torch.cat([one.num_ties for one in cuts]),
        )

    def tighter(self, other: "Cut") -> "Cut":
        """The cut that keeps less, for each row."""
        ties = torch.minimum(self.num_ties, other.num_ties)
        ties = ties.where(self.threshold == other.threshold, self.num_ties)
        above = self.threshold >= other.threshold
        return Cut(
            self.threshold.where(above, other.threshold),
            self.weight.where(above, other.weight),
            ties.where(above, other.num_ties),
        )

    def shares(self, logits: Tensor, best: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """For each block: the weight of what is kept, and the ties in the blocks before it.

        logits: [R, V] float32.  best, scale: see masses.py.  Returns [R, num_blocks] each.
        """
        above = block_masses(logits, best, scale, self.threshold)
        if not self.has_ties:
            return above, torch.zeros_like(above)
        ties = torch.cat([_ties(logits[rows], self.threshold[rows]) for rows in chunks(logits)])
        before = ties.cumsum(-1) - ties
        kept_ties = torch.minimum((self.num_ties - before).clamp_(min=0), ties)
        return above + kept_ties.float() * self.weight, before


def _ties(logits: Tensor, threshold: Tensor) -> Tensor:
    """The number of logits equal to the threshold in each block."""
    mask = torch.empty_like(logits)  # torch compares much faster into float32 than into bool
    return block_sums(torch.eq(logits, threshold, out=mask))
