"""bitsandbytes: int8 with a scale of each output, or blocks of numbers of 4 bits from a table.

8 bits: weight int8 [out, in], and SCB [out], each output's largest number.
4 bits: weight [numbers / 2, 1] bytes, as uint8 or seen as wider numbers, two numbers a byte, the
high half first; weight.quant_map, the
numbers that there are; weight.absmax, each block's largest number, itself of 8 bits where there
are nested ones; and a quant_state in JSON.
"""

import json
from math import prod
from typing import Any

import torch
from torch import Tensor

from winnow.quantization.formats.base import Format, Parts, Settings

_LARGEST = 127
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")


def bitsandbytes(settings: Settings) -> Format:
    if settings.get("load_in_4bit"):
        of_4_bits = (".weight", ".weight.quant_map", *_NESTED, *_STATES)
        return Format(".weight.absmax", of_4_bits, _shape_of_4_bits, _dequantize_4_bits)
    of_8_bits = (".weight", ".weight_format")
    return Format(".SCB", of_8_bits, lambda parts: parts.shape(".weight"), _dequantize_8_bits)


def _dequantize_8_bits(parts: Parts) -> Tensor:
    return parts.read(".weight").float() * (parts.read(".SCB").float() / _LARGEST)[:, None]


def _state(parts: Parts) -> Any:  # noqa: ANN401
    suffix = next(suffix for suffix in _STATES if parts.has(suffix))
    return json.loads(bytes(parts.read(suffix).tolist()))


def _shape_of_4_bits(parts: Parts) -> tuple[int, ...]:
    return tuple(_state(parts)["shape"])


def _dequantize_4_bits(parts: Parts) -> Tensor:
    state = _state(parts)
    shape, size = tuple(state["shape"]), state["blocksize"]
    stored = parts.read(".weight").flatten().view(torch.uint8)
    indices = torch.stack([stored >> 4, stored & 0xF], dim=-1).flatten()[: prod(shape)]
    numbers = parts.read(".weight.quant_map").float()[indices.int()]
    largest = _largest(parts, state).repeat_interleave(size)[: len(numbers)]
    return (numbers * largest).view(shape)


def _largest(parts: Parts, state: Any) -> Tensor:  # noqa: ANN401
    """Of each block."""
    stored = parts.read(".weight.absmax")
    if not parts.has(".weight.nested_absmax"):
        return stored.float()
    numbers = parts.read(".weight.nested_quant_map").float()[stored.int()]
    scales = parts.read(".weight.nested_absmax").float()
    spread = scales.repeat_interleave(state["nested_blocksize"])[: len(numbers)]
    return numbers * spread + float(state["nested_offset"])
