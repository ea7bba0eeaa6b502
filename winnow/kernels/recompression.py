"""Scoring and compaction for recompression, of many (layer, KV head) pairs at once.

N heads of any lengths, in pages; no loop over them, and no length is read back. Keys and values may
be int8 with scales, as winnow/kv_quantization.py says.
"""

import torch
from torch import Tensor

from winnow.kernels.softmax import capped, softmax
from winnow.kv_quantization import dequantize


def window_scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
    scales: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that each entry receives from its head's window, summed over group and window.

    queries: [N, group, w, D], of the last w tokens.  keys: [num_pages, page_size, D].
    pages: [N, P] and lengths: [N] of each head, w or more entries.
    scales: [num_pages, page_size, 2] float16, of int8 keys and of values.
    softcap: see Variant.  sinks: [N, group], as there.
    Returns [N, P * page_size] float32, 0 behind a head's last entry.
    """
    num_heads, group, window, _ = queries.shape
    own = padded_keys(keys, pages, scales, queries.dtype)
    logits = (queries.flatten(1, 2) @ own.mT).float().mul_(scaling)
    logits = logits.view(num_heads, group, window, -1)
    entry = torch.arange(own.shape[1], device=keys.device)
    query = torch.arange(window, device=keys.device)
    is_hidden = entry > (lengths[:, None] - window + query)[..., None]  # [N, w, T]
    # Where a page has no entry yet there may be anything, NaN included.
    logits = capped(logits, softcap).masked_fill_(is_hidden[:, None], -torch.inf)
    return softmax(logits, None if sinks is None else sinks[..., None, None]).sum((1, 2))


def padded_keys(keys: Tensor, pages: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The keys of each head, and what is behind them: [N, P * page_size, D] of the dtype."""
    taken = pages.flatten()
    own = keys.index_select(0, taken)
    if scales is not None:
        own = dequantize(own, scales.index_select(0, taken)[..., 0], dtype)
    return own.view(len(pages), -1, keys.shape[2])


def compact(pool: tuple[Tensor, ...], pages: Tensor, kept: Tensor, lengths: Tensor) -> None:
    """Move each head's kept entries to the beginning of its pages.

    pool: keys and values [num_pages, page_size, D], positions [num_pages, page_size], and of int8
    ones scales [num_pages, page_size, 2]; in place.
    kept: [N, K] ascending indices; the first `lengths` [N] of each head count.
    """
    page_size, num_kept = pool[0].shape[1], kept.shape[1]
    rank = torch.arange(num_kept, device=pages.device)
    target = pages.repeat_interleave(page_size, 1)[:, :num_kept] * page_size + rank % page_size
    source = pages.gather(1, kept // page_size) * page_size + kept % page_size
    source = torch.where(rank < lengths[:, None], source, target)  # what counts not stays
    for part in pool:
        flat = part.view(-1, *part.shape[2:])
        flat.index_copy_(0, target.flatten(), flat.index_select(0, source.flatten()))
