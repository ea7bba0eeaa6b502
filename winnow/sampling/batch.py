"""sample_batch: the next token of every row, with one wait for the device, when it is read."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import NotFinite
from winnow.sampling.blocks import block_maxima, first_best
from winnow.sampling.draw import draw
from winnow.sampling.filters import Kind
from winnow.sampling.logprobs import logprob_columns
from winnow.sampling.masks import TokenMasks
from winnow.sampling.shaping import HIGHEST_LOGIT, shaped
from winnow.sampling.state import SamplingState
from winnow.to_device import indices_to_device
from winnow.to_host import HostCopy
from winnow.tokens import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and its log-probabilities if they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SampledBatch:
    """What `sample_batch` has put on the device's queue.

    tokens: [B] int64, on the device.
    columns: [B, 2 + ...] float64: token id, whether the logits are finite, logprob_columns.
    """

    tokens: Tensor
    columns: HostCopy
    positions: tuple[int, ...]
    num_logprobs: tuple[int | None, ...]

    def read(self) -> list[Sampled | NotFinite]:
        """Each row's token or error.  Waits for the device, until it has sampled them."""
        rows = zip(self.columns.wait().tolist(), self.positions, self.num_logprobs, strict=True)
        return [_outcome(*row) for row in rows]


def _outcome(columns: list[float], position: int, num_logprobs: int | None) -> Sampled | NotFinite:
    token_id, is_finite, *logprobs = columns
    if not is_finite:
        return NotFinite(f"the model's logits at position {position} are not finite")
    if num_logprobs is None:
        return Sampled(int(token_id))
    chosen, *top = logprobs
    num_top = len(top) // 2
    pairs = zip(map(int, top[num_top:]), top[:num_top], strict=True)
    return Sampled(int(token_id), TokenLogprobs(chosen, tuple(pairs)[:num_logprobs]))


@torch.inference_mode()
def sample_batch(
    logits: Tensor,
    states: Sequence[SamplingState],
    eos_token_ids: Collection[int] = (),
    masks: TokenMasks | None = None,
) -> SampledBatch:
    """Sample the next token of each row; the device is not waited for.

    logits: [B, V] float32, of up to ±HIGHEST_LOGIT, above which they count as not finite; not
    changed.
    eos_token_ids: of the model. They are not sampled before a row's `min_tokens`, nor are its own
    stop tokens.
    masks: of the rows that have a constraint.  Log-probabilities are those without masks.
    """
    maxima = block_maxima(logits)
    is_finite = (maxima.amax(-1) <= HIGHEST_LOGIT) & (logits.amin(-1) >= -HIGHEST_LOGIT)
    changed = shaped(logits, states, eos_token_ids, masks)
    changed_maxima = maxima if changed is logits else block_maxima(changed)
    tokens = first_best(changed, changed_maxima)  # of greedy rows; it costs little for all
    for rows in _alike(states):
        index = _row_indices(rows, logits.device)
        own = [states[row] for row in rows]
        drawn = draw(_rows(changed, index), _rows(changed_maxima, index), own)
        tokens.index_copy_(0, index, drawn)
    columns = torch.stack([tokens.double(), is_finite.double()], dim=1)
    return SampledBatch(
        tokens,
        HostCopy(_with_logprobs(columns, logits, maxima, tokens, states)),
        tuple(state.position for state in states),
        tuple(state.params.num_logprobs for state in states),
    )


def _alike(states: Sequence[SamplingState]) -> list[list[int]]:
    """The rows that are drawn at random, in groups of one kind of filter."""
    groups: dict[Kind, list[int]] = {}
    for row, state in enumerate(states):
        if state.params.temperature > 0:
            groups.setdefault(Kind.of(state.params), []).append(row)
    return list(groups.values())


def _row_indices(rows: list[int], device: torch.device) -> Tensor:
    return indices_to_device([rows], device)[0]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows of a tensor, which is not copied if that is all of them."""
    return values if len(index) == len(values) else values.index_select(0, index)


def _with_logprobs(
    columns: Tensor,
    logits: Tensor,
    maxima: Tensor,
    tokens: Tensor,
    states: Sequence[SamplingState],
) -> Tensor:
    """The columns, followed by those of log-probabilities if any row asks for them."""
    asked = [state.params.num_logprobs for state in states]
    rows = [row for row, number in enumerate(asked) if number is not None]
    if not rows:
        return columns
    most = min(max(number for number in asked if number is not None), logits.shape[1])
    index = _row_indices(rows, logits.device)
    logits, maxima, tokens = (_rows(values, index) for values in (logits, maxima, tokens))
    found = logprob_columns(logits, maxima, tokens, most)
    wide = columns.new_zeros(len(states), found.shape[1])
    return torch.cat([columns, wide.index_copy_(0, index, found)], dim=1)
