"""Logits and weights [R, V] seen as blocks of consecutive token ids.

Reducing whole blocks reads memory at full speed; what follows looks into a few blocks only. The
last block may be shorter.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK_SIZE = 256
_CPU_ROWS = 4  # what is computed of so many stays in the cache


def block_maxima(logits: Tensor) -> Tensor:
    """The maximum of each block, NaN if it holds one: [R, num_blocks]."""
    return _reduced(logits, lambda block: block.amax(-1))


def block_sums(weights: Tensor) -> Tensor:
    """The sum of each block: [R, num_blocks]."""
    return _reduced(weights, lambda block: block.sum(-1))


def _reduced(values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    num_rows, size = values.shape
    num_whole, rest = divmod(size, BLOCK_SIZE)
    whole = values[:, : size - rest].view(num_rows, num_whole, BLOCK_SIZE)
    if not rest:
        return reduce(whole)
    return torch.cat([reduce(whole), reduce(values[:, None, size - rest :])], dim=1)


def block_ids(blocks: Tensor) -> Tensor:
    """Token ids of the blocks, some beyond the vocabulary.  [R, n] to [R, n * BLOCK_SIZE]."""
    offsets = torch.arange(BLOCK_SIZE, device=blocks.device)
    return (blocks[:, :, None] * BLOCK_SIZE + offsets).flatten(1)


def at(values: Tensor, token_ids: Tensor, beyond: float) -> Tensor:
    """Values [R, V] at token_ids [R, n]; `beyond` where an id is beyond the vocabulary."""
    last = values.shape[1] - 1
    found = values.gather(1, token_ids.clamp(max=last))
    return found.masked_fill_(token_ids > last, beyond)


def first_best(logits: Tensor, maxima: Tensor) -> Tensor:
    """The first of the likeliest tokens: [R] int64.  maxima: of the logits' blocks."""
    ids = block_ids(maxima.argmax(-1, keepdim=True))
    best = at(logits, ids, -torch.inf).argmax(-1, keepdim=True)
    return ids.gather(1, best)[:, 0]


def top_tokens(logits: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest logits in descending order, and their token ids: [R, count] each.

    They are in the `count` blocks with the highest maxima. Which of equal logits comes first, or is
    left out, is not defined.
    """
    if 2 * count * BLOCK_SIZE > logits.shape[1]:
        top = logits.topk(count, -1)
        return top.values, top.indices
    ids = block_ids(maxima.topk(count, -1).indices)
    candidates = at(logits, ids, -torch.inf).topk(count, -1)
    return candidates.values, ids.gather(1, candidates.indices)


def chunks(values: Tensor) -> Iterator[slice]:
    """The rows of a [R, V] tensor in as many steps as the device needs."""
    num_rows = _CPU_ROWS if values.device.type == "cpu" else len(values)
    for start in range(0, len(values), num_rows):
        yield slice(start, start + num_rows)
