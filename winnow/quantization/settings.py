"""The setting `quantize`."""

from typing import Literal

from winnow.errors import InvalidSetting

Quantize = Literal["int8"]


def require_quantize(quantize: str | None, device: str, num_ranks: int = 1) -> Quantize | None:
    """Raise InvalidSetting for what is not known, or does not run on the device or on ranks."""
    if quantize is None:
        return None
    if quantize != "int8":
        raise InvalidSetting(f"quantize is {quantize!r}; it can be int8", param="quantize")
    if device != "cpu":
        raise InvalidSetting(
            f"quantize int8 is for CPUs; the device is {device}. Quantized checkpoints run there",
            param="quantize",
        )
    if num_ranks > 1:
        raise InvalidSetting(
            f"quantize int8 does not run on several processes; tensor_parallel is {num_ranks}",
            param="quantize",
        )
    return "int8"
