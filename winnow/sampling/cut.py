"""Cut: which tokens of each row the filters keep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.sampling.blocks import block_sums


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Keeps logits above `threshold`, and the first `num_ties` of those equal to it.

    weight: of one token at the threshold.  All are [R, 1]; num_ties is float64 and may be inf.
    has_ties: false if num_ties is 0 in every row.
    """

    threshold: Tensor
    weight: Tensor
    num_ties: Tensor
    has_ties: bool = True

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

    def shares(self, logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """For each block: the weight of what is kept, and the ties in the blocks before it.

        logits, weights: [R, V] float32.  Returns [R, num_blocks] each.
        """
        mask = torch.empty_like(weights)  # torch compares much faster into float32 than into bool
        above = block_sums(torch.gt(logits, self.threshold, out=mask).mul_(weights))
        if not self.has_ties:
            return above, torch.zeros_like(above)
        ties = block_sums(torch.eq(logits, self.threshold, out=mask))
        before = ties.cumsum(-1) - ties
        kept_ties = torch.minimum((self.num_ties - before).clamp_(min=0), ties)
        return above + kept_ties * self.weight, before
