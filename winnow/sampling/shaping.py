"""Penalties, biases, tokens that are not due yet, masks: what changes logits before a draw.

Only the tokens concerned are touched, by (row, token) lists that each SamplingState keeps; masks
are of whole rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.sampling.masks import TokenMasks, masked
from winnow.sampling.state import SamplingState, TokenCounts
from winnow.sampling_params import SamplingParams
from winnow.to_device import array_to_device

HIGHEST_LOGIT = 2.0**100  # 1.3e30: divided by the lowest temperature it is a float32 still


def shaped(
    logits: Tensor,
    states: Sequence[SamplingState],
    eos_token_ids: Collection[int],
    masks: TokenMasks | None = None,
) -> Tensor:
    """Logits [B, V] after penalties, then biases, then min_tokens; a copy if anything changes.

    masks: come last, and keep to min_tokens themselves.
    """
    changed = _reweighted(logits, states, eos_token_ids)
    return changed if masks is None else masked(changed, masks, -HIGHEST_LOGIT)


def _reweighted(
    logits: Tensor, states: Sequence[SamplingState], eos_token_ids: Collection[int]
) -> Tensor:
    penalized = [
        _Penalized(row, one.params, one.counts)
        for row, one in enumerate(states)
        if one.counts is not None and len(one.counts.ids)
    ]
    biased = {row: one for row, one in enumerate(states) if len(one.bias)}
    waiting = {
        row: one.params.stop_token_ids
        for row, one in enumerate(states)
        if not one.may_end and one.constraint is None
    }
    if not (penalized or biased or waiting):
        return logits
    changed = logits.clone()
    if penalized:
        _penalize(changed, penalized)
    if biased:
        index = _index(changed, [(row, one.bias_ids) for row, one in biased.items()])
        bias = np.concatenate([one.bias for one in biased.values()])
        changed.view(-1).index_add_(0, index, array_to_device(bias, logits.device))
    if waiting:
        ends = [
            (row, np.array([*eos_token_ids, *stops], np.int64)) for row, stops in waiting.items()
        ]
        changed.view(-1).index_fill_(0, _index(changed, ends), -HIGHEST_LOGIT)
    return changed


@dataclass(frozen=True, slots=True)
class _Penalized:
    row: int
    params: SamplingParams
    counts: TokenCounts


def _penalize(logits: Tensor, rows: Sequence[_Penalized]) -> None:
    """Divide or multiply by the repetition penalty, then subtract the other two; in place."""
    lengths = [len(one.counts.ids) for one in rows]
    generated = np.concatenate([one.counts.counts for one in rows])

    def spread(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, dtype=np.float32), lengths)

    divisors = spread([one.params.repetition_penalty for one in rows])
    offsets = spread([one.params.presence_penalty for one in rows]) * (generated > 0)
    offsets += spread([one.params.frequency_penalty for one in rows]) * generated
    divisor, offset = array_to_device(np.stack([divisors, offsets]), logits.device)
    index = _index(logits, [(one.row, one.counts.ids) for one in rows])
    values = logits.view(-1)[index]
    values = torch.where(values > 0, values / divisor, values * divisor) - offset
    logits.view(-1)[index] = values.clamp_(-HIGHEST_LOGIT, HIGHEST_LOGIT)  # for penalties near 0


def _index(logits: Tensor, tokens_of_rows: Sequence[tuple[int, NDArray[np.int64]]]) -> Tensor:
    """Indices into the flattened logits."""
    size = logits.shape[1]
    flat = np.concatenate([row * size + token_ids for row, token_ids in tokens_of_rows])
    return array_to_device(flat, logits.device)
