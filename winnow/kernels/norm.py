"""RMSNorm, and the sum of the residual stream that it follows."""

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden: [T, n].  weight: [n].  Rounds to the type of `hidden` before `weight` is applied."""
    scale = hidden.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return weight * (hidden.float() * scale).to(hidden.dtype)


def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of `hidden + residual` (each [T, n]), and that sum, the next residual."""
    total = torch.add(hidden, residual)
    return rms_norm(total, weight, eps), total
