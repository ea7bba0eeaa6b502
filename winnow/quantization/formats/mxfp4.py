"""MXFP4: stacked experts in blocks of 32 numbers of 4 bits, with one power of two.

..._blocks: uint8 [experts, out, blocks, 16], two numbers a byte, the low half first.
..._scales: uint8 [experts, out, blocks], the exponent plus 127.
The weight: [experts, in, out].
"""

import torch
from torch import Tensor

from winnow.quantization.formats.base import Format, Parts, Settings

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_POSITIVE, *(-number for number in _POSITIVE)])
_BIAS = 127


def mxfp4(_: Settings) -> Format:
    return Format("_blocks", ("_scales",), _shape, _dequantize, weight="")


def _shape(parts: Parts) -> tuple[int, ...]:
    *before, num_outputs, num_blocks, num_bytes = parts.shape("_blocks")
    return (*before, num_blocks * num_bytes * 2, num_outputs)


def _dequantize(parts: Parts) -> Tensor:
    stored = parts.read("_blocks")
    two = torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(-2)  # [..., blocks, 32]
    exponents = parts.read("_scales").int() - _BIAS
    numbers = torch.ldexp(_NUMBERS[two.int()], exponents[..., None])
    return numbers.flatten(-2).transpose(-1, -2).contiguous()
