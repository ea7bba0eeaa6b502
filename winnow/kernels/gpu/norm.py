"""RMSNorm, and the sum of the residual stream that it follows: a program per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, require_contiguous

_ELEMENTS_PER_WARP = 512  # two vectors of 16 bytes per thread
_MAX_WARPS = 16


@triton.jit
def _rms_norm(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    eps,
    size,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < size
    row_at = tl.program_id(0).to(tl.int64) * size + at
    loaded = tl.load(hidden_ptr + row_at, mask=inside, other=0.0)
    hidden = loaded.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row_at, mask=inside, other=0.0)
        total = (hidden + residual.to(tl.float32)).to(loaded.dtype)
        tl.store(total_ptr + row_at, total, mask=inside)
        hidden = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = weight * (hidden * scale).to(loaded.dtype).to(tl.float32)
    tl.store(normed_ptr + row_at, normed.to(loaded.dtype), mask=inside)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `winnow.kernels.norm.rms_norm`."""
    return _launch(hidden, None, weight, eps)[0]


def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `winnow.kernels.norm.add_rms_norm`."""
    require_contiguous(residual=residual)
    return _launch(hidden, residual, weight, eps)


def _launch(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm, and the sum that it is of."""
    require_contiguous(hidden=hidden, weight=weight)
    num_tokens, size = hidden.shape
    normed = torch.empty_like(hidden)
    total = hidden if residual is None else torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    _rms_norm[(num_tokens,)](
        hidden,
        hidden if residual is None else residual,
        weight,
        normed,
        total,
        eps,
        size,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // _ELEMENTS_PER_WARP, 1), _MAX_WARPS),
        **FUSED,
    )
    return normed, total
