"""The probability mass of each block of a vocabulary, in one pass over the logits."""

import torch
from torch import Tensor

from winnow.kernels.cpu.library import is_portable_usable, portable_library


def can_sum(logits: Tensor) -> bool:
    """Whether the kernel takes these logits [R, V], and can be used here."""
    is_float = logits.is_cpu and logits.dtype == torch.float32 and logits.stride(1) == 1
    return is_float and is_portable_usable()


def block_masses(
    logits: Tensor, best: Tensor, scale: Tensor, threshold: Tensor | None, block_size: int
) -> Tensor:
    """As `winnow.sampling.masses.block_masses`, for blocks of `block_size` tokens."""
    num_rows, size = logits.shape
    numbers = [best, scale] if threshold is None else [best, scale, threshold]
    for one in numbers:
        assert one.shape == (num_rows, 1) and one.dtype == torch.float32 and one.is_contiguous()
    masses = logits.new_empty((num_rows, -(-size // block_size)))
    portable_library().winnow_block_masses(
        logits.data_ptr(),
        best.data_ptr(),
        scale.data_ptr(),
        None if threshold is None else threshold.data_ptr(),
        masses.data_ptr(),
        num_rows,
        size,
        logits.stride(0),
        block_size,
        torch.get_num_threads(),
    )
    return masses
