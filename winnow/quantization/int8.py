"""Weights as int8 with one float32 scale for each row, the weights of one output.

A number x becomes the level round(x / s), from -127 to 127, with s = max|x| / 127 of its row, and
is read as level * s. Every level is a bfloat16, so products with them lose nothing more.
"""

import torch
from torch import Tensor

LARGEST = 127
_BLOCK_NUMBERS = 1 << 22  # quantized at a time, to bound the memory of what lies between


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels, int8 of the weight's shape, and scales, float32 [...].  weight: [..., in]."""
    rows = weight.reshape(-1, weight.shape[-1])
    levels = torch.empty_like(rows, dtype=torch.int8)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    step = max(1, _BLOCK_NUMBERS // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        numbers = rows[block].float()
        scales[block] = numbers.abs().amax(1) / LARGEST
        smallest = torch.finfo(torch.float32).tiny  # of a row of zeros
        levels[block] = (numbers / scales[block, None].clamp_min(smallest)).round_()
    return levels.view(weight.shape), scales.view(weight.shape[:-1])


def dequantized(levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """levels: int8 [..., in].  scales: float32 [...].  Returns [..., in] of the dtype."""
    return (levels.float() * scales[..., None]).to(dtype)
