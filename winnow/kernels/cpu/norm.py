"""RMSNorm, and the sum of the residual stream that it follows."""

import torch
from torch import Tensor

from winnow.kernels.cpu.library import library, require


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `winnow.kernels.norm.rms_norm`."""
    require(hidden=hidden, weight=weight)
    normed = torch.empty_like(hidden)
    library().winnow_rms_norm(
        hidden.data_ptr(),
        None,
        weight.data_ptr(),
        normed.data_ptr(),
        None,
        *hidden.shape,
        eps,
        torch.get_num_threads(),
    )
    return normed


def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `winnow.kernels.norm.add_rms_norm`."""
    require(hidden=hidden, residual=residual, weight=weight)
    normed, total = torch.empty_like(hidden), torch.empty_like(hidden)
    library().winnow_rms_norm(
        hidden.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        total.data_ptr(),
        *hidden.shape,
        eps,
        torch.get_num_threads(),
    )
    return normed, total
