"""Decode attention over pages, split over the entries of each (row, KV head).

A split is SPLIT entries, whatever the batch, so a row's result does not depend on what shares its
batch. A head of one split is done by `_attend` alone; `_combine` merges the splits of longer ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, needs_float32, require_contiguous
from winnow.kernels.gpu.quantization import quantize
from winnow.kernels.variant import PLAIN, Variant

HEAD_DIMS = (64, 96, 128, 256)
MAX_GROUP = 16  # query heads per KV head: the rows of one tensor-core product
SPLIT = 512
NUM_WARPS = 4
NUM_STAGES = 3
_LOG2_E = 1.4426950408889634
_COMBINED = 16  # splits that are merged at a time
# What differs from one batch, or table, to the next; a kernel that depended on it would be compiled
# again while requests wait.
_UNSPECIALIZED = {
    "do_not_specialize": ["width", "num_splits"],
    "do_not_specialize_on_alignment": ["slots_ptr", "lengths_ptr", "rows_ptr", "first_ptr"],
}


def block_size(head_dim: int, *, is_int8: bool = False) -> int:
    """Entries that are loaded at a time: their products with 16 queries fit into registers."""
    num_entries = 32 if head_dim > 128 else 64
    return num_entries // 2 if is_int8 else num_entries


@triton.jit
def _capped(logits, softcap):
    """The product of softcap and tanh(logits / softcap)."""
    return softcap - 2 * softcap / (tl.exp2(logits * (2 * 1.4426950408889634 / softcap)) + 1)


@triton.jit(**_UNSPECIALIZED)
def _attend(  # noqa: PLR0912 - most are decided when it is compiled
    query_ptr,
    new_keys_ptr,
    new_values_ptr,
    keys_ptr,
    values_ptr,
    scales_ptr,
    slots_ptr,
    pages_ptr,
    rows_ptr,
    lengths_ptr,
    first_ptr,
    positions_ptr,
    sinks_ptr,
    output_ptr,
    partial_ptr,
    stats_ptr,
    scaling,
    softcap,
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
    INT8: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
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
    held_key = new_key.to(tl.float32)
    held_value = new_value.to(tl.float32)
    if INT8:
        new_key, new_key_scale = quantize(held_key)
        new_value, new_value_scale = quantize(held_value)
        held_key = new_key.to(tl.float32) * new_key_scale.to(tl.float32)
        held_value = new_value.to(tl.float32) * new_value_scale.to(tl.float32)
    if has_new:
        slot = tl.load(slots_ptr + head).to(tl.int64)
        tl.store(keys_ptr + slot * D + dim, new_key, mask=in_dim)
        tl.store(values_ptr + slot * D + dim, new_value, mask=in_dim)
        if INT8:
            tl.store(scales_ptr + slot * 2, new_key_scale)
            tl.store(scales_ptr + slot * 2 + 1, new_value_scale)
    logit = tl.sum(query.to(tl.float32) * held_key[None, :], 1) * scaling
    if SOFTCAP:
        logit = _capped(logit, softcap)
    best = tl.where(has_new, logit, -float("inf"))
    total = tl.where(has_new, 1.0, 0.0) + tl.zeros([16], tl.float32)
    mixed = tl.where(has_new, held_value, 0.0)[None, :]
    mixed += tl.zeros([16, D_PAD], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + kv_head * GROUP + group, mask=group < GROUP, other=0.0)
        sink = tl.where(has_new, sink.to(tl.float32) * 1.4426950408889634, -float("inf"))
        best = tl.maximum(logit, sink)
        weight = tl.exp2(logit - best)
        total = tl.where(has_new, weight + tl.exp2(sink - best), 0.0)
        mixed *= weight[:, None]
        best = tl.where(has_new, best, -float("inf"))
    if WINDOW:
        first_position = tl.load(first_ptr + row)

    table_row = tl.load(rows_ptr + row).to(tl.int64)
    own_pages_ptr = pages_ptr + (table_row * num_kv_heads + kv_head) * width
    end = tl.minimum(start + SPLIT, old_length)
    for first in range(start, end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        is_entry = entry < end
        page = tl.load(own_pages_ptr + entry // PAGE, mask=is_entry, other=0)
        slots = page.to(tl.int64) * PAGE + entry % PAGE
        is_seen = is_entry
        if WINDOW:  # loads of keys and values must not wait for this one
            position = tl.load(positions_ptr + slots, mask=is_entry, other=0)
            is_seen &= position >= first_position
        block_at = (slots * D)[:, None] + dim[None, :]
        in_block = is_entry[:, None] & in_dim[None, :]
        key = tl.load(keys_ptr + block_at, mask=in_block, other=0)
        value = tl.load(values_ptr + block_at, mask=in_block, other=0)
        # As the query: float32 in the interpreter, else 16 bits, which hold any int8.
        key = key.to(query.dtype)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        if INT8:
            # Both scales of an entry are one word: shorter ones would not be loaded ahead.
            pair_ptr = scales_ptr.to(tl.pointer_type(tl.int32))
            pair = tl.load(pair_ptr + slots, mask=is_entry, other=0)
            key_scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
            logits *= key_scale.to(tl.float32)[None, :]
        if SOFTCAP:
            logits = _capped(logits, softcap)
        logits = tl.where(is_seen[None, :], logits, -float("inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        base = new_best
        if WINDOW:  # which may hide all entries so far
            base = tl.where(new_best == -float("inf"), 0.0, new_best)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        if INT8:
            value_scale = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
            weights *= value_scale.to(tl.float32)[None, :]
        value = value.to(WEIGHTS)
        mixed += tl.dot(weights.to(WEIGHTS), value, input_precision="ieee")
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


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["lengths_ptr"])
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


def _weights_dtype(query: Tensor, *, is_int8: bool) -> tl.dtype:
    """In which weights are multiplied with values.

    Weights times int8's scales have too large a range for float16.
    """
    if needs_float32(query) or query.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if is_int8 or query.dtype == torch.bfloat16 else tl.float16


def append_and_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    rows: Tensor,
    lengths: Tensor,
    most: int,
    scaling: float,
    scales: Tensor | None = None,
    variant: Variant = PLAIN,
) -> Tensor:
    """As `winnow.kernels.attention.append_and_attend`; waits for nothing."""
    is_int8 = scales is not None
    # Of the following, what there is not is not read.
    scales = scales if scales is not None else keys
    first = variant.first if variant.first is not None else rows
    positions = variant.positions if variant.positions is not None else lengths
    sinks = variant.sinks if variant.sinks is not None else query
    require_contiguous(keys=keys, values=values, slots=slots, pages=pages, lengths=lengths)
    require_contiguous(rows=rows, scales=scales, first=first, positions=positions)
    assert variant.sinks is None or variant.sinks.is_contiguous()
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, width = pages.shape[1:]
    group, page_size = num_heads // num_kv_heads, keys.shape[1]
    assert group <= MAX_GROUP, f"{group} query heads share a KV head; the limit is {MAX_GROUP}"
    assert query.stride(2) == new_keys.stride(2) == new_values.stride(2) == 1
    heads = num_rows * num_kv_heads
    num_splits = triton.cdiv(max(most - 1, 1), SPLIT)
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
        scales,
        slots,
        pages,
        rows,
        lengths,
        first,
        positions,
        sinks,
        output,
        partial,
        stats,
        scaling * _LOG2_E,  # logits in base 2
        (variant.softcap or 1.0) * _LOG2_E,
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
        BLOCK=block_size(head_dim, is_int8=is_int8),
        FLOAT32=needs_float32(query),
        INT8=is_int8,
        WEIGHTS=_weights_dtype(query, is_int8=is_int8),
        WINDOW=variant.first is not None,
        SOFTCAP=variant.softcap is not None,
        SINKS=variant.sinks is not None,
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
