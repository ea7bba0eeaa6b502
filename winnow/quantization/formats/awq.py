"""AWQ: numbers of 4 bits packed along the outputs in an order of their own.

qweight: int32 [in, out / 8].  scales: [groups, out].  qzeros: int32 [groups, out / 8].
"""

from torch import Tensor

from winnow.errors import UnusableModel
from winnow.quantization.formats.base import Format, Parts, Settings, unpacked

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of a word's outputs among its numbers, the lowest bits first


def awq(settings: Settings) -> Format:
    """Raises UnusableModel for other numbers of bits, or another order of them."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise UnusableModel(
            f"AWQ of {bits} bits in the form {version!r} cannot be dequantized; known are 4 bits "
            "in gemm"
        )
    return Format(".qweight", (".qzeros", ".scales"), _shape, _dequantize)


def _shape(parts: Parts) -> tuple[int, int]:
    num_inputs, words = parts.shape(".qweight")
    return words * 8, num_inputs


def _dequantize(parts: Parts) -> Tensor:
    levels = _numbers(parts.read(".qweight"))  # [in, out]
    scales = parts.read(".scales").float()  # [groups, out]
    zeros = _numbers(parts.read(".qzeros"))
    size = len(levels) // len(scales)
    levels = levels.view(len(scales), size, -1)
    weight = (levels - zeros[:, None]) * scales[:, None]  # [groups, size, out]
    return weight.flatten(0, 1).T.contiguous()


def _numbers(words: Tensor) -> Tensor:
    """words: int32 [rows, out / 8].  Returns [rows, out]."""
    numbers = unpacked(words, 4, 1).view(len(words), -1, 8)
    return numbers[..., _PLACES].flatten(1)
