"""draw: a random token for each row, by a race of all tokens against exponential noise.

A token's noise has its id as counter, a block's -1 - its index.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.sampling.blocks import at, block_ids, block_sums, chunks
from winnow.sampling.filters import Filters
from winnow.sampling.noise import exponential, noise_keys
from winnow.sampling.state import SamplingState
from winnow.to_device import array_to_device


def draw(logits: Tensor, maxima: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token of each row: [R] int64.

    logits: [R, V] float32, after penalties.  maxima: of their blocks.
    states: of the rows; their filters are of one kind.
    """
    entrants = _Entrants(logits, maxima, states)
    keys = array_to_device(noise_keys((one.seed, one.position) for one in states), logits.device)
    counters = torch.arange(-1, -1 - maxima.shape[1], -1, device=logits.device)
    block = (entrants.totals / exponential(keys, counters)).argmax(-1, keepdim=True)
    ids = block_ids(block)
    winner = (entrants.of_block(block) / exponential(keys, ids)).argmax(-1, keepdim=True)
    return ids.gather(1, winner)[:, 0]


class _Entrants:
    """The weights of the tokens that the filters keep, up to a factor of each row's.

    totals: the sum of each block's, [R, num_blocks].
    """

    def __init__(self, logits: Tensor, maxima: Tensor, states: Sequence[SamplingState]) -> None:
        self._logits = logits
        self._filters = Filters.of([state.params for state in states], logits.device)
        self._best = maxima.amax(-1, keepdim=True)
        self._threshold = torch.full_like(self._best, -torch.inf)
        self._num_ties = torch.zeros_like(self._filters.inverse_temperature)
        self._ties_before = torch.zeros_like(maxima)  # each block
        self.totals = torch.empty_like(maxima)
        for rows in chunks(logits):
            self._enter(rows, maxima)

    def _enter(self, rows: slice, maxima: Tensor) -> None:
        logits, filters = self._logits[rows], self._filters.of_rows(rows)
        weights = filters.weights(logits)
        cut = filters.cut(logits, maxima[rows], weights)
        if cut is None:
            self.totals[rows] = block_sums(weights)
            return
        self._threshold[rows], self._num_ties[rows] = cut.threshold, cut.num_ties
        self.totals[rows], self._ties_before[rows] = cut.shares(logits, weights)

    def of_block(self, block: Tensor) -> Tensor:
        """The weights in block [R, 1]: [R, BLOCK_SIZE] float64, 0 beyond the vocabulary."""
        logits = at(self._logits, block_ids(block), -torch.inf)
        is_tie = logits == self._threshold
        rank = self._ties_before.gather(1, block) + is_tie.cumsum(-1)
        keeps = (logits > self._threshold) | (is_tie & (rank <= self._num_ties))
        below_best = (logits - self._best).double() * self._filters.inverse_temperature
        return below_best.exp_() * keeps
