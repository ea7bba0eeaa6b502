"""compressed-tensors: int8 or FP8 weights, or integers packed along the inputs, with scales.

weight: int8 or FP8 [out, in]; or weight_packed: int32 [out, in * bits / 32], of levels that are
made positive, and weight_shape.  weight_scale: one, of each output, of groups of inputs, or of
blocks.
weight_zero_point: like weight_scale; as int32 packed along the outputs.
weight_g_idx: the group of each input.
"""

from typing import Any

import torch
from torch import Tensor

from winnow.errors import UnusableModel
from winnow.quantization.formats.base import (
    ACTIVATIONS,
    CACHE,
    Format,
    Parts,
    Settings,
    spread,
    unpacked,
)

_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_PACKED = "pack-quantized"
_BITS = (2, 4, 8)


def compressed_tensors(settings: Settings) -> Format:
    """Raises UnusableModel for a form, or numbers of bits, that cannot be dequantized."""
    form = settings.get("format", "dense")
    dropped = ACTIVATIONS + CACHE
    if form in _PLAIN:
        plain = (".weight", ".weight_zero_point", ".weight_g_idx")
        return Format(".weight_scale", plain, _shape, _dequantize, dropped=dropped)
    if form == _PACKED:
        _require_known(settings)
        packed = tuple(f".weight_{part}" for part in ("shape", "scale", "zero_point", "g_idx"))
        return Format(".weight_packed", packed, _packed_shape, _dequantize_packed, dropped=dropped)
    raise UnusableModel(
        f"compressed-tensors in the form {form!r} cannot be dequantized; known are "
        f"{', '.join((*_PLAIN, _PACKED))}"
    )


def _shape(parts: Parts) -> tuple[int, ...]:
    return parts.shape(".weight")


def _dequantize(parts: Parts) -> Tensor:
    zeros = parts.read(".weight_zero_point").float() if parts.has(".weight_zero_point") else None
    return _scaled(parts, parts.read(".weight").float(), zeros)


def _packed_shape(parts: Parts) -> tuple[int, ...]:
    return tuple(parts.read(".weight_shape").tolist())


def _dequantize_packed(parts: Parts) -> Tensor:
    num_outputs, num_inputs = _packed_shape(parts)
    words = parts.read(".weight_packed")
    bits = words.shape[1] * 32 // num_inputs
    middle = 1 << (bits - 1)  # what was added to make levels positive
    levels = unpacked(words, bits, 1)[:, :num_inputs] - middle
    zeros = None
    if parts.has(".weight_zero_point"):
        zeros = parts.read(".weight_zero_point")
        if zeros.dtype == torch.int32:
            zeros = unpacked(zeros, bits, 0)[:num_outputs] - middle
    return _scaled(parts, levels.float(), zeros)


def _scaled(parts: Parts, levels: Tensor, zeros: Tensor | None) -> Tensor:
    scales = parts.read(".weight_scale")
    if parts.has(".weight_g_idx"):
        groups = parts.read(".weight_g_idx").long()
        scales = scales[:, groups]
        zeros = None if zeros is None else zeros[:, groups]
    shape, block = tuple(levels.shape), _block(parts.settings)
    if zeros is not None:
        levels = levels - spread(zeros, shape, block)
    return levels * spread(scales, shape, block)


def _block(settings: Settings) -> tuple[int, ...] | None:
    blocks = (one.get("block_structure") for one in _of_weights(settings))
    found = {tuple(block) for block in blocks if block}
    return found.pop() if len(found) == 1 else None


def _require_known(settings: Settings) -> None:
    """Raise UnusableModel for numbers that are packed otherwise."""
    for one in _of_weights(settings):
        if (bits := one.get("num_bits", 4)) not in _BITS:
            raise UnusableModel(
                f"compressed-tensors of {bits} bits in the form {_PACKED!r} cannot be dequantized; "
                f"known are {', '.join(map(str, _BITS))} bits"
            )


def _of_weights(settings: Settings) -> list[Settings]:
    """How each group of modules has its weights quantized."""
    groups: dict[str, Any] = settings.get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values()]
