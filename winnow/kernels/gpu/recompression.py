"""Scoring and compaction for recompression, for many (layer, KV head) pairs at once.

Scores take two passes over the keys: the first leaves each query's normaliser, the second sums
each entry's shares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, needs_float32, require_contiguous

_ROWS = 32  # queries of a tile
_LOG2_E = 1.4426950408889634
# What changes from one call to the next; a kernel that depended on it would be compiled in a step.
_UNSPECIALIZED = {
    "do_not_specialize": ["width", "num_rows", "window", "num_kept"],
    "do_not_specialize_on_alignment": ["pages_ptr", "lengths_ptr", "kept_ptr"],
}


def _block_size(head_dim: int) -> int:
    """Entries of a tile."""
    return 32 if head_dim > 128 else 64


@triton.jit
def _logits(
    queries_ptr,
    keys_ptr,
    scales_ptr,
    pages_ptr,
    head,
    row,
    entry,
    length,
    scaling,
    width,
    num_rows,
    window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    FLOAT32: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """A tile of logits in base 2: [rows, entries], -inf where a query does not see an entry."""
    dim = tl.arange(0, D_PAD)
    in_dim = (dim < D)[None, :]
    is_entry = entry < length
    page = tl.load(pages_ptr + head * width + entry // PAGE, mask=is_entry, other=0)
    slot = page.to(tl.int64) * PAGE + entry % PAGE
    key_at = (slot * D)[:, None] + dim[None, :]
    key = tl.load(keys_ptr + key_at, mask=is_entry[:, None] & in_dim, other=0)
    query_at = ((head * num_rows + row) * D)[:, None] + dim[None, :]
    is_row = (row < num_rows)[:, None]
    query = tl.load(queries_ptr + query_at, mask=is_row & in_dim, other=0.0)
    if HAS_SCALES:
        scale = tl.load(scales_ptr + slot * 2, mask=is_entry, other=0.0).to(tl.float32)
        key = (key.to(tl.float32) * scale[:, None]).to(query.dtype)
    if FLOAT32:
        key = key.to(tl.float32)
        query = query.to(tl.float32)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    is_visible = entry[None, :] <= (length - window + row % window)[:, None]
    return tl.where(is_visible & is_row, logits, -float("inf"))


@triton.jit(**_UNSPECIALIZED)
def _normalisers(
    queries_ptr,
    keys_ptr,
    scales_ptr,
    pages_ptr,
    lengths_ptr,
    normalisers_ptr,
    scaling,
    width,
    num_rows,
    window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT32: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths_ptr + head).to(tl.int32)
    best = tl.full([ROWS], -1e30, tl.float32)  # finite: a tile may have no visible entry
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, length, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        logits = _logits(
            queries_ptr,
            keys_ptr,
            scales_ptr,
            pages_ptr,
            head,
            row,
            entry,
            length,
            scaling,
            width,
            num_rows,
            window,
            D,
            D_PAD,
            PAGE,
            FLOAT32,
            HAS_SCALES,
        )
        new_best = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - new_best)
        total += tl.sum(tl.exp2(logits - new_best[:, None]), 1)
        best = new_best
    normaliser = best + tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(normalisers_ptr + head * num_rows + row, normaliser, mask=row < num_rows)


@triton.jit(**_UNSPECIALIZED)
def _shares(
    queries_ptr,
    keys_ptr,
    scales_ptr,
    pages_ptr,
    lengths_ptr,
    normalisers_ptr,
    scores_ptr,
    scaling,
    width,
    num_rows,
    window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT32: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + head).to(tl.int32)
    score = tl.zeros([BLOCK], tl.float32)
    if tl.program_id(1) * BLOCK < length:
        for first in range(0, num_rows, ROWS):
            row = first + tl.arange(0, ROWS)
            logits = _logits(
                queries_ptr,
                keys_ptr,
                scales_ptr,
                pages_ptr,
                head,
                row,
                entry,
                length,
                scaling,
                width,
                num_rows,
                window,
                D,
                D_PAD,
                PAGE,
                FLOAT32,
                HAS_SCALES,
            )
            normaliser_at = normalisers_ptr + head * num_rows + row
            normaliser = tl.load(normaliser_at, mask=row < num_rows, other=0.0)
            score += tl.sum(tl.exp2(logits - normaliser[:, None]), 0)
    slots = width * PAGE
    tl.store(scores_ptr + head * slots + entry, score, mask=entry < slots)


@triton.jit(**_UNSPECIALIZED)
def _compact(
    keys_ptr,
    values_ptr,
    positions_ptr,
    scales_ptr,
    pages_ptr,
    kept_ptr,
    lengths_ptr,
    width,
    num_kept,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + head).to(tl.int32)
    dim = tl.arange(0, D_PAD)
    pages = pages_ptr + head * width
    # Indices ascend, so no entry is overwritten by an earlier block than the one that moves it.
    for first in range(0, length, BLOCK):
        rank = first + tl.arange(0, BLOCK)
        counts = rank < length
        inside = counts[:, None] & (dim < D)[None, :]
        entry = tl.load(kept_ptr + head * num_kept + rank, mask=counts, other=0).to(tl.int32)
        page = tl.load(pages + entry // PAGE, mask=counts, other=0).to(tl.int64)
        source = page * PAGE + entry % PAGE
        page = tl.load(pages + rank // PAGE, mask=counts, other=0).to(tl.int64)
        target = page * PAGE + rank % PAGE
        source_at = source[:, None] * D + dim[None, :]
        target_at = target[:, None] * D + dim[None, :]
        keys = tl.load(keys_ptr + source_at, mask=inside, other=0)
        values = tl.load(values_ptr + source_at, mask=inside, other=0)
        positions = tl.load(positions_ptr + source, mask=counts, other=0)
        if HAS_SCALES:
            scales = tl.load(scales_ptr + source, mask=counts, other=0)
        tl.debug_barrier()  # all threads have read the block before any of it is overwritten
        tl.store(keys_ptr + target_at, keys, mask=inside)
        tl.store(values_ptr + target_at, values, mask=inside)
        tl.store(positions_ptr + target, positions, mask=counts)
        if HAS_SCALES:
            tl.store(scales_ptr + target, scales, mask=counts)
        tl.debug_barrier()


def window_scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
    scales: Tensor | None = None,
) -> Tensor:
    """As `winnow.kernels.recompression.window_scores`; waits for nothing."""
    require_contiguous(queries=queries, keys=keys, pages=pages, lengths=lengths)
    num_heads, group, window, head_dim = queries.shape
    page_size, width, num_rows = keys.shape[1], pages.shape[1], group * window
    block = _block_size(head_dim)
    constants = {
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "PAGE": page_size,
        "ROWS": _ROWS,
        "BLOCK": block,
        "FLOAT32": needs_float32(keys),
        "HAS_SCALES": scales is not None,
    }
    scores = keys.new_empty((num_heads, width * page_size), dtype=torch.float32)
    normalisers = keys.new_empty((num_heads, num_rows), dtype=torch.float32)
    common = (queries, keys, scales, pages, lengths, normalisers)
    scalars = (scaling * _LOG2_E, width, num_rows, window)  # logits in base 2
    grid = (num_heads, triton.cdiv(num_rows, _ROWS))
    _normalisers[grid](*common, *scalars, **constants, **FUSED)
    grid = (num_heads, triton.cdiv(width * page_size, block))
    _shares[grid](*common, scores, *scalars, **constants, **FUSED)
    return scores


def compact(pool: tuple[Tensor, ...], pages: Tensor, kept: Tensor, lengths: Tensor) -> None:
    """As `winnow.kernels.recompression.compact`; waits for nothing."""
    for tensor in (*pool, pages, kept, lengths):
        require_contiguous(tensor=tensor)
    keys, values, positions, *scales = pool
    head_dim = keys.shape[2]
    _compact[(len(pages),)](
        keys,
        values,
        positions,
        scales[0].view(torch.int32) if scales else None,  # both of an entry as one word
        pages,
        kept,
        lengths,
        pages.shape[1],
        kept.shape[1],
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        PAGE=keys.shape[1],
        BLOCK=_block_size(head_dim),
        HAS_SCALES=bool(scales),
        num_stages=1,
        **FUSED,
    )
