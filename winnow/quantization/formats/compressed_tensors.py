"""compressed-tensors: int8 or FP8 weights, or integers packed along the inputs, with scales.

weight: int8 or FP8 [out, in]; or weight_packed: int32 [out, in * bits / 32], of levels that are
made positive, and weight_shape.  weight_scale: one, of each output, of groups of inputs, or of
blocks.
weight_zero_point: like weight_scale; packed along the outputs where weights are packed.
weight_g_idx: the group of each input.
"""

from typing import Any

from torch import Tensor

from winnow.errors import UnusableModel
from winnow.quantization.formats.base import Format, Parts, Settings, spread, unpacked

_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_PACKED = "pack-quantized"
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


def compressed_tensors(settings: Settings) -> Format:
    form = settings.get("format", "dense")
    dropped = _ACTIVATIONS + _CACHE
    if form in _PLAIN:
        plain = (".weight", ".weight_zero_point", ".weight_g_idx")
        return Format(".weight_scale", plain, _shape, _dequantize, dropped=dropped)
    if form == _PACKED:
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
        zeros = unpacked(parts.read(".weight_zero_point"), bits, 0)[:num_outputs] - middle
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
    groups: dict[str, Any] = settings.get("config_groups", {})
    weights: list[Any] = [group.get("weights") or {} for group in groups.values()]
    found = {tuple(one["block_structure"]) for one in weights if one.get("block_structure")}
    return found.pop() if len(found) == 1 else None
