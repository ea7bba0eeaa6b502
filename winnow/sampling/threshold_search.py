"""Finds the thresholds of top-k, top-p and min-p without sorting, by bisection."""

from collections.abc import Callable

import torch
from torch import Tensor

from winnow.sampling.blocks import block_sums
from winnow.sampling.cut import Cut

_LOWEST = torch.finfo(torch.float32).min


class ThresholdSearch:
    """One bisection is over the bits of a float32: 32 passes over the rows.

    logits, weights: [R, V] float32; weights: see masses.py.
    best: the highest logits.  inverse_temperature: float64.  Both [R, 1].
    """

    def __init__(
        self, logits: Tensor, weights: Tensor, best: Tensor, inverse_temperature: Tensor
    ) -> None:
        self._logits = logits
        self._weights = weights
        self._best = best
        self._inverse_temperature = inverse_temperature
        self._buffer = torch.empty_like(weights)

    def by_count(self, count: Tensor) -> Cut:
        """Keeps the first `count` tokens [R, 1] float64, which may be inf."""
        threshold = self._lowest_below_limit(count, self._count_above)
        num_ties = count - self._count_above(threshold)
        return Cut(threshold, self._weight_at(threshold), num_ties)

    def by_mass(self, mass: Tensor) -> Cut:
        """Keeps each token before which less than `mass` lies; [R, 1] float64, may be inf."""
        threshold = self._lowest_below_limit(mass, self._mass_above)
        weight = self._weight_at(threshold)
        num_ties = ((mass - self._mass_above(threshold)) / weight).ceil()
        num_ties = num_ties.clamp_(min=1)  # a mass so small that it is 0 keeps the likeliest token
        return Cut(threshold, weight, num_ties)

    def mass(self, cut: Cut) -> Tensor:
        """The total weight of what a cut keeps: [R, 1] float64."""
        ties = torch.eq(self._logits, cut.threshold, out=self._buffer).sum(-1, keepdim=True)
        kept_ties = torch.minimum(cut.num_ties, ties)
        return self._mass_above(cut.threshold) + kept_ties * cut.weight

    def _weight_at(self, logit: Tensor) -> Tensor:
        return ((logit - self._best).double() * self._inverse_temperature).exp().float()

    def _count_above(self, threshold: Tensor) -> Tensor:
        return torch.gt(self._logits, threshold, out=self._buffer).sum(-1, keepdim=True).double()

    def _mass_above(self, threshold: Tensor) -> Tensor:
        above = torch.gt(self._logits, threshold, out=self._buffer).mul_(self._weights)
        # PyTorch sums a whole row in another order if it is alone and has many threads.
        return block_sums(above).double().sum(-1, keepdim=True)

    def _lowest_below_limit(self, limit: Tensor, sum_above: Callable[[Tensor], Tensor]) -> Tensor:
        """The lowest threshold with a sum of less than `limit` above it: one of the logits."""
        high = _ordinal(self._best)
        low = _ordinal(torch.full_like(self._best, _LOWEST))
        for _ in range(32):
            middle = (low + high) >> 1
            is_below = sum_above(_from_ordinal(middle)) < limit
            high = middle.where(is_below, high)
            low = (middle + 1).where(~is_below, low)
        return _from_ordinal(high)


def _ordinal(value: Tensor) -> Tensor:
    """float32 as int64 in the same order."""
    bits = value.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _from_ordinal(ordinal: Tensor) -> Tensor:
    bits = ordinal.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
