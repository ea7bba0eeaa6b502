"""min-p, top-k and top-p without sorting the vocabulary: each row gets a threshold.

In the order of descending logits, equal ones by ascending token id, each keeps a beginning:

    min-p  the tokens with at least min_p of the highest probability
    top-k  the first k
    top-p  of what these two keep, each token before which less than top_p of the total lies
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from winnow.sampling.blocks import chunks, top_tokens
from winnow.sampling.cut import Cut
from winnow.sampling.masses import LOG2_E, weights_of
from winnow.sampling.threshold_search import ThresholdSearch
from winnow.sampling_params import SamplingParams
from winnow.to_device import array_to_device

_MAX_SORTED = 1024
# Lower temperatures count as this one: logits of up to HIGHEST_LOGIT can be divided by it.
_COLDEST = 2.0**-27


class Kind(Enum):
    """How a row's threshold is found."""

    UNFILTERED = auto()
    MIN_P = auto()  # min-p alone: computed
    SORTED = auto()  # top_k up to _MAX_SORTED: so many logits are sorted
    SEARCHED = auto()  # otherwise: by bisection

    @classmethod
    def of(cls, params: SamplingParams) -> "Kind":
        if 0 < params.top_k <= _MAX_SORTED:
            return cls.SORTED
        if params.top_k or params.top_p < 1:
            return cls.SEARCHED
        return cls.MIN_P if params.min_p else cls.UNFILTERED


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """The temperatures and filters of rows of one kind.

    table: [R, 4] float64: 1 / temperature; top_k and top_p, inf where they are off; min_p. Each is
    [R, 1] by its own name.
    max_top_k: 0 if no row has one.
    """

    kind: Kind
    table: Tensor
    max_top_k: int
    has_top_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> "Filters":
        table = [
            (
                1 / max(one.temperature, _COLDEST),
                one.top_k or np.inf,
                one.top_p if one.top_p < 1 else np.inf,
                one.min_p,
            )
            for one in params
        ]
        return cls(
            Kind.of(params[0]),
            array_to_device(np.array(table, dtype=np.float64), device),
            max_top_k=max(one.top_k for one in params),
            has_top_p=any(one.top_p < 1 for one in params),
        )

    @property
    def inverse_temperature(self) -> Tensor:
        return self.table[:, 0:1]

    @property
    def top_k(self) -> Tensor:
        return self.table[:, 1:2]

    @property
    def top_p(self) -> Tensor:
        return self.table[:, 2:3]

    @property
    def min_p(self) -> Tensor:
        return self.table[:, 3:4]

    @property
    def scale(self) -> Tensor:
        """See masses.py."""
        return (self.inverse_temperature * LOG2_E).float()

    def cut(self, logits: Tensor, maxima: Tensor) -> Cut | None:
        """What is kept of each row; None if everything is.

        logits: [R, V] float32.  maxima: of their blocks.
        """
        if self.kind is Kind.UNFILTERED:
            return None
        if self.kind is Kind.SORTED:
            return self._sorted_cut(logits, maxima)
        best = maxima.amax(-1, keepdim=True)
        if self.kind is Kind.MIN_P:
            return self._min_p_cut(best)
        return Cut.joined(
            [self._of_rows(rows)._searched_cut(logits[rows], best[rows]) for rows in chunks(logits)]
        )

    def _of_rows(self, rows: slice) -> "Filters":
        return replace(self, table=self.table[rows])

    def _searched_cut(self, logits: Tensor, best: Tensor) -> Cut:
        cut = self._min_p_cut(best)
        weights = weights_of(logits, best, self.scale)
        search = ThresholdSearch(logits, weights, best, self.inverse_temperature)
        if self.max_top_k:
            cut = cut.tighter(search.by_count(self.top_k))
        if self.has_top_p:
            cut = cut.tighter(search.by_mass(self.top_p * search.mass(cut)))
        return cut

    def _min_p_cut(self, best: Tensor) -> Cut:
        """Its threshold is the highest number that is too low, so nothing that is kept is a tie."""
        lowest = (best + self.min_p.log() / self.inverse_temperature).float()
        too_low = lowest.nextafter(torch.full_like(lowest, -torch.inf))
        return Cut(too_low, torch.zeros_like(best), torch.zeros_like(self.min_p), has_ties=False)

    def _sorted_cut(self, logits: Tensor, maxima: Tensor) -> Cut:
        values, _ = top_tokens(logits, maxima, min(self.max_top_k, logits.shape[1]))
        relative = ((values - values[:, :1]).double() * self.inverse_temperature).exp()
        ranks = torch.arange(values.shape[1], device=values.device)
        kept = relative * ((ranks < self.top_k) & (relative >= self.min_p))
        running = kept.cumsum(-1)  # whose last is the total, however many zeros follow
        is_kept = (kept > 0) & (running - kept < self.top_p * running[:, -1:])
        last = is_kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0)  # -1 where logits are NaN
        threshold = values.gather(1, last)
        num_ties = last + 1 - (values > threshold).sum(-1, keepdim=True)
        return Cut(threshold, relative.gather(1, last).float(), num_ties.double())
