"""GPTQ: integers packed along the inputs, scales and zeros of groups of inputs.

qweight: int32 [in * bits / 32, out].  scales: [groups, out].  qzeros: int32 [groups, out * bits /
32], one too low except in version 2; 0 is then the largest number.  g_idx: int32 [in], the group of
each input.
"""

import torch
from torch import Tensor

from winnow.errors import UnusableModel
from winnow.quantization.formats.base import Format, Parts, Settings, unpacked

_BITS = (2, 4, 8)  # 3 are packed across words
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def gptq(settings: Settings) -> Format:
    """Raises UnusableModel for other numbers of bits, or another form."""
    bits, version = settings.get("bits", 4), settings.get("checkpoint_format") or "gptq"
    if bits not in _BITS or version not in _ZERO_OFFSETS:
        raise UnusableModel(
            f"GPTQ of {bits} bits in the form {version!r} cannot be dequantized; known are "
            f"{', '.join(map(str, _BITS))} bits in {', '.join(_ZERO_OFFSETS)}"
        )

    def shape(parts: Parts) -> tuple[int, int]:
        words, num_outputs = parts.shape(".qweight")
        return num_outputs, words * 32 // bits

    def dequantize(parts: Parts) -> Tensor:
        levels = unpacked(parts.read(".qweight"), bits, 0)  # [in, out]
        stored = unpacked(parts.read(".qzeros"), bits, 1)  # [groups, out]
        zeros: Tensor = (stored + _ZERO_OFFSETS[version]) & ((1 << bits) - 1)
        scales = parts.read(".scales").float()
        groups = _groups(parts, len(levels), len(scales))
        weight: Tensor = (levels - zeros[groups]) * scales[groups]
        return weight.T.contiguous()

    return Format(".qweight", (".qzeros", ".scales", ".g_idx"), shape, dequantize)


def _groups(parts: Parts, num_inputs: int, num_groups: int) -> Tensor:
    """The group of each input."""
    if parts.has(".g_idx"):
        return parts.read(".g_idx").long()
    return torch.arange(num_inputs) // -(-num_inputs // num_groups)
