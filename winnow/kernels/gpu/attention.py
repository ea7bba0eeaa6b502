"""Decode attention over pages, split over the entries of each (row, KV head).

A split is SPLIT entries, whatever the batch, so a row's result does not depend on what shares its
batch. A head of one split is done by `_attend` alone; `_combine` merges the splits of longer ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, needs_float32, require_contiguous

HEAD_DIMS = (64, 96, 128, 256)
MAX_GROUP = 16  # query heads per KV head: the rows of one tensor-core product
SPLIT = 512
NUM_WARPS = 4
NUM_STAGES = 3
_LOG2_E = 1.4426950408889634
_COMBINED = 16  # splits that are merged at a time


def block_size(head_dim: int) -> int:
    """Entries that are loaded at a time, so that NUM_STAGES blocks fit into shared memory."""
    return 32 if head_dim > 128 else 64


@triton.jit
def _attend(
    query_ptr,
    new_keys_ptr,
    new_values_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    pages_ptr,
    lengths_ptr,
    output_ptr,
    partial_ptr,
    stats_ptr,
    scaling,
    query_stride_b,
    query_stride_h,
    keys_stride_b,
    keys_stride_h,
    values_stride_b,
    values_stride_h,
    num_kv_heads,
    width,
    num_splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # of all rows
    split = tl.program_id(1)
    old_length = tl.load(lengths_ptr + head).to(tl.int32) - 1  # without the new entry
    start = split * SPLIT
    if split > 0 and start >= old_length:
        return
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    dim = tl.arange(0, D_PAD)
    group = tl.arange(0, 16)
    in_dim = dim < D
    in_group = (group < GROUP)[:, None] & in_dim[None, :]

    query_at = (kv_head * GROUP + group)[:, None] * query_stride_h + dim[None, :]
    query = tl.load(query_ptr + row * query_stride_b + query_at, mask=in_group, other=0.0)
    if FLOAT32:
        query = query.to(tl.float32)

    # The new entry opens split 0 from registers: within the loop it would cost the vector loads.
    key_at = row * keys_stride_b + kv_head * keys_stride_h + dim
    new_key = tl.load(new_keys_ptr + key_at, mask=in_dim, other=0.0)
    value_at = row * values_stride_b + kv_head * values_stride_h + dim
    new_value = tl.load(new_values_ptr + value_at, mask=in_dim, other=0.0)
    has_new = (split == 0) & (old_length >= 0)
    if has_new:
        slot = tl.load(slots_ptr + head).to(tl.int64) * D
        tl.store(keys_ptr + slot + dim, new_key, mask=in_dim)
        tl.store(values_ptr + slot + dim, new_value, mask=in_dim)
    logit = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scaling
    best = tl.where(has_new, logit, -float("inf"))
    total = tl.where(has_new, 1.0, 0.0) + tl.zeros([16], tl.float32)
    mixed = tl.where(has_new, new_value.to(tl.float32), 0.0)[None, :]
    mixed += tl.zeros([16, D_PAD], tl.float32)

    end = tl.minimum(start + SPLIT, old_length)
    for first in range(start, end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        is_entry = entry < end
        page = tl.load(pages_ptr + head * width + entry // PAGE, mask=is_entry, other=0)
        block_at = ((page.to(tl.int64) * PAGE + entry % PAGE) * D)[:, None] + dim[None, :]
        in_block = is_entry[:, None] & in_dim[None, :]
        key = tl.load(keys_ptr + block_at, mask=in_block, other=0.0)
        value = tl.load(values_ptr + block_at, mask=in_block, other=0.0)
        if FLOAT32:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        logits = tl.where(is_entry[None, :], logits, -float("inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp2(logits - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        best = new_best

    if old_length <= SPLIT:
        mixed /= tl.where(total > 0, total, 1.0)[:, None]
        output_at = (head * GROUP + group)[:, None] * D + dim[None, :]
        tl.store(output_ptr + output_at, mixed.to(output_ptr.dtype.element_ty), mask=in_group)
    else:
        split_at = (head * num_splits + split) * GROUP + group
        tl.store(partial_ptr + split_at[:, None] * D + dim[None, :], mixed, mask=in_group)
        tl.store(stats_ptr + split_at * 2, best, mask=group < GROUP)
        tl.store(stats_ptr + split_at * 2 + 1, total, mask=group < GROUP)


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    lengths_ptr,
    output_ptr,
    num_splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    COMBINED: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    old_length = tl.load(lengths_ptr + head).to(tl.int32) - 1
    if old_length <= SPLIT:
        return
    own_splits = tl.cdiv(old_length, SPLIT)
    dim = tl.arange(0, D_PAD)
    best = -float("inf")
    total = 0.0
    mixed = tl.zeros([D_PAD], tl.float32)
    for first in range(0, own_splits, COMBINED):
        split = first + tl.arange(0, COMBINED)
        is_split = split < own_splits
        at = (head * num_splits + split) * GROUP + group
        bests = tl.load(stats_ptr + at * 2, mask=is_split, other=-float("inf"))
        totals = tl.load(stats_ptr + at * 2 + 1, mask=is_split, other=0.0)
        in_partial = is_split[:, None] & (dim < D)[None, :]
        partial_at = at[:, None] * D + dim[None, :]
        partial = tl.load(partial_ptr + partial_at, mask=in_partial, other=0.0)
        new_best = tl.maximum(best, tl.max(bests, 0))
        weights = tl.exp2(bests - new_best)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights * totals, 0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * partial, 0)
        best = new_best
    mixed /= total
    output_at = (head * GROUP + group) * D + dim
    tl.store(output_ptr + output_at, mixed.to(output_ptr.dtype.element_ty), mask=dim < D)


def append_and_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
) -> Tensor:
    """As `winnow.kernels.attention.append_and_attend`; waits for nothing."""
    require_contiguous(keys=keys, values=values, slots=slots, pages=pages, lengths=lengths)
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, width = pages.shape[1:]
    group, page_size = num_heads // num_kv_heads, keys.shape[1]
    assert group <= MAX_GROUP, f"{group} query heads share a KV head; the limit is {MAX_GROUP}"
    assert query.stride(2) == new_keys.stride(2) == new_values.stride(2) == 1
    heads = num_rows * num_kv_heads
    num_splits = triton.cdiv(max(width * page_size - 1, 1), SPLIT)
    output = query.new_empty(query.shape)
    partial = query.new_empty((heads, num_splits, group, head_dim), dtype=torch.float32)
    stats = query.new_empty((heads, num_splits, group, 2), dtype=torch.float32)
    padded = triton.next_power_of_2(head_dim)
    _attend[(heads, num_splits)](
        query,
        new_keys,
        new_values,
        keys,
        values,
        slots,
        pages,
        lengths,
        output,
        partial,
        stats,
        scaling * _LOG2_E,  # logits in base 2
        *query.stride()[:2],
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        num_kv_heads,
        width,
        num_splits,
        GROUP=group,
        D=head_dim,
        D_PAD=padded,
        PAGE=page_size,
        SPLIT=SPLIT,
        BLOCK=block_size(head_dim),
        FLOAT32=needs_float32(query),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        **FUSED,
    )
    if num_splits > 1:
        _combine[(heads, group)](
            partial,
            stats,
            lengths,
            output,
            num_splits,
            GROUP=group,
            D=head_dim,
            D_PAD=padded,
            SPLIT=SPLIT,
            COMBINED=_COMBINED,
            **FUSED,
        )
    return output
