"""Keys and values as int8: each vector of D numbers has one float16 scale.

Symmetric: x is held as q = round(x / s), from -127 to 127, with the scale s = max|x| / 127 of its
vector, rounded up to float16. An error is at most s / 2, hence at most max|x| / 253 + 3e-8; zeros
stay zeros. Every step is one correctly rounded float32 operation, so every device gives the same
bits. To quantize again what was dequantized in float32 changes nothing, if max|x| is above 0.008.

A vector with inf or NaN, or with a number above 8.3 million, has a scale of inf or NaN. It comes
back as NaN, so what reports non-finite numbers reports it.
"""

import torch
from torch import Tensor

LARGEST = 127
_INVERSE = 1 / LARGEST  # a product is the same on every device; a quotient by a constant is not


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """vectors: [..., D] of a float dtype.  Returns [..., D] int8 and scales [...] float16."""
    exact = vectors.float()
    largest = exact.abs().amax(-1)
    scales = (largest * _INVERSE).half()
    is_low = scales.float() * LARGEST < largest
    scales = (scales.view(torch.int16) + is_low).view(torch.float16)  # the next float16 above
    levels = (exact / scales.float()[..., None]).nan_to_num_(0).round_()
    return levels.to(torch.int8), scales


def pack(vectors: Tensor) -> Tensor:
    """The quantized vectors, each followed by the bytes of its scale: [..., D + 2] int8."""
    levels, scales = quantize(vectors)
    return torch.cat([levels, scales[..., None].view(torch.int8)], dim=-1)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors [..., D] that `pack` gave `packed` of."""
    scales = packed[..., -2:].contiguous().view(torch.float16)[..., 0]
    return dequantize(packed[..., :-2], scales, dtype)


def dequantize(levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors [..., D] that `quantize` gave levels [..., D] and scales [...] of."""
    return (levels * scales.float()[..., None]).to(dtype)
