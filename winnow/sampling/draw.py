"""draw: a random token for each row, by a race of all tokens against exponential noise.

A token's noise has its id as counter, a block's -1 - its index.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.sampling.blocks import BLOCK_SIZE, at, block_ids
from winnow.sampling.filters import Filters
from winnow.sampling.masses import block_masses
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
    blocks, weights = _fastest_block(entrants, keys)
    ids = block_ids(blocks)
    winner = (weights / exponential(keys, ids)).argmax(-1, keepdim=True)
    return ids.gather(1, winner)[:, 0]


def _fastest_block(entrants: "_Entrants", keys: Tensor) -> tuple[Tensor, Tensor]:
    """The block that wins each row's race, [R, 1], and its tokens' weights, [R, BLOCK_SIZE].

    float32 totals find the two fastest, float64 ones decide between them: how a device rounds its
    sums is in all but a few draws in 10^12 of no account.
    """
    num_blocks = entrants.totals.shape[1]
    counters = torch.arange(-1, -1 - num_blocks, -1, device=keys.device)
    noise = exponential(keys, counters)
    finalists = (entrants.totals / noise).topk(min(2, num_blocks)).indices
    weights = entrants.of_blocks(finalists)
    scores = weights.sum(-1) / noise.gather(1, finalists)
    first = scores.argmax(-1, keepdim=True)
    return finalists.gather(1, first), weights.take_along_dim(first[..., None], 1)[:, 0]


class _Entrants:
    """The weights of the tokens that the filters keep, up to a factor of each row's.

    totals: the sum of each block's, [R, num_blocks] float32.
    """

    def __init__(self, logits: Tensor, maxima: Tensor, states: Sequence[SamplingState]) -> None:
        filters = Filters.of([state.params for state in states], logits.device)
        self._logits = logits
        self._best = maxima.amax(-1, keepdim=True)
        self._inverse_temperature = filters.inverse_temperature
        self._cut = filters.cut(logits, maxima)
        if self._cut is None:
            self.totals = block_masses(logits, self._best, filters.scale)
        else:
            shares = self._cut.shares(logits, self._best, filters.scale)
            self.totals, self._ties_before = shares

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """The weights in blocks [R, n]: [R, n, BLOCK_SIZE] float64, 0 beyond the vocabulary."""
        logits = at(self._logits, block_ids(blocks), -torch.inf)
        weights = ((logits - self._best).double() * self._inverse_temperature).exp_()
        logits, weights = (one.view(*blocks.shape, BLOCK_SIZE) for one in (logits, weights))
        return weights if self._cut is None else weights * self._keeps(logits, blocks)

    def _keeps(self, logits: Tensor, blocks: Tensor) -> Tensor:
        """Whether the filters keep the tokens of blocks [R, n] with logits [R, n, BLOCK_SIZE]."""
        assert self._cut is not None
        threshold, num_ties = self._cut.threshold[..., None], self._cut.num_ties[..., None]
        is_tie = logits == threshold
        rank = self._ties_before.gather(1, blocks)[..., None] + is_tie.cumsum(-1)
        return (logits > threshold) | (is_tie & (rank <= num_ties))
