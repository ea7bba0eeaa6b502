"""FP8 by blocks: weights of 8 bits, and a scale of each block (`weight_scale_inv`)."""

from torch import Tensor

from winnow.quantization.formats.base import Format, Parts, Settings, spread


def fp8(settings: Settings) -> Format:
    block = tuple(settings.get("weight_block_size") or (128, 128))

    def dequantize(parts: Parts) -> Tensor:
        weight = parts.read("").float()
        of_matrix = (1,) * (weight.ndim - 2) + block  # experts are stacked before
        return weight * spread(parts.read("_scale_inv"), tuple(weight.shape), of_matrix)

    dropped = (".activation_scale", ".input_scale")
    return Format("_scale_inv", ("",), lambda parts: parts.shape(""), dequantize, "", dropped)
