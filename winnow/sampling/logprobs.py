"""Log-probabilities under the raw logits, of the chosen and the likeliest tokens."""

import torch
from torch import Tensor

from winnow.sampling.blocks import top_tokens
from winnow.sampling.masses import LOG2_E, block_masses


def logprob_columns(logits: Tensor, maxima: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """For each row the token's log-probability, then the top ones, then their token ids.

    logits: [R, V] float32.  maxima: of their blocks.  tokens: [R].
    Returns [R, 1 + 2 * num_top] float64, in which token ids are exact.
    """
    best = maxima.amax(-1, keepdim=True)
    masses = block_masses(logits, best, torch.full_like(best, LOG2_E))
    log_total = masses.sum(-1, keepdim=True).log_()
    chosen = logits.gather(1, tokens[:, None])
    values, ids = top_tokens(logits, maxima, num_top)
    # Not `best + log_total`: large logits would take that sum's last places.
    found = ((one - best - log_total).double() for one in (chosen, values))
    return torch.cat([*found, ids], dim=1)
