"""Rotary embedding of queries and keys, and their norms before it.

A program rotates some heads of one row.
"""

import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, require_contiguous
from winnow.kernels.rope import HeadNorms

_HEADS = 16  # of a program: 16 bytes per thread for the smallest heads


@triton.jit
def _rotate(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    row_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF_PAD)
    in_dim = dim < HALF
    inside = (head < NUM_HEADS + NUM_KV_HEADS)[:, None] & in_dim[None, :]
    heads_at = heads_ptr + row * row_stride + head[:, None] * D + dim[None, :]
    dtype = heads_ptr.dtype.element_ty
    first = tl.load(heads_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads_at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORMS:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D
        scale = tl.rsqrt(mean + eps)[:, None]
        is_query = (head < NUM_HEADS)[:, None]
        query_norm = tl.load(query_norm_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
        key_norm = tl.load(key_norm_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
        first *= scale * tl.where(is_query, query_norm[None, :], key_norm[None, :])
        query_norm = tl.load(query_norm_ptr + HALF + dim, mask=in_dim, other=0.0).to(tl.float32)
        key_norm = tl.load(key_norm_ptr + HALF + dim, mask=in_dim, other=0.0).to(tl.float32)
        second *= scale * tl.where(is_query, query_norm[None, :], key_norm[None, :])
    cos = tl.load(cos_ptr + row * D + dim, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * D + dim, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    tl.store(heads_at, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(heads_at + HALF, (second * cos + first * sin).to(dtype), mask=inside)


def rotate(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """As `winnow.kernels.rope.rotate`."""
    require_contiguous(heads=heads, cos=cos, sin=sin)
    num_rows, all_heads, head_dim = heads.shape
    assert all_heads == num_heads + 2 * num_kv_heads, f"{all_heads} heads in the projection"
    _rotate[(num_rows, triton.cdiv(num_heads + num_kv_heads, _HEADS))](
        heads,
        cos,
        sin,
        heads if norms is None else norms.query,
        heads if norms is None else norms.key,
        0.0 if norms is None else norms.eps,
        heads.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        HALF_PAD=triton.next_power_of_2(head_dim // 2),
        HEADS=_HEADS,
        HAS_NORMS=norms is not None,
        num_warps=2,
        **FUSED,
    )
