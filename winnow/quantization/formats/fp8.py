"""FP8: weights of 8 bits, and a scale of each block or of the whole.

The scales are called `weight_scale_inv`, or `weight_scale`; both are multiplied with.
"""

from torch import Tensor

from winnow.quantization.formats.base import (
    ACTIVATIONS,
    CACHE,
    Format,
    Parts,
    Settings,
    spread,
)

_INVERSE, _PLAIN = "_scale_inv", "_scale"


def fp8(settings: Settings) -> Format:
    block = tuple(settings.get("weight_block_size") or (128, 128))

    def dequantize(parts: Parts) -> Tensor:
        weight = parts.read("").float()
        of_matrix = (1,) * (weight.ndim - 2) + block  # experts are stacked before
        scales = parts.read(_INVERSE if parts.has(_INVERSE) else _PLAIN)
        return weight * spread(scales, tuple(weight.shape), of_matrix)

    return Format(
        _INVERSE,
        ("",),
        lambda parts: parts.shape(""),
        dequantize,
        weight="",
        dropped=ACTIVATIONS + CACHE,
        other_marker=_PLAIN,
    )
