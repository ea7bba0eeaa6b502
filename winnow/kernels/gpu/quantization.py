"""As `winnow.kv_quantization.quantize`, of one vector in registers: the same bits."""

import triton
import triton.language as tl

_INVERSE: tl.constexpr = tl.constexpr(1 / 127)
# Adding it to a number below 2^22 leaves no fraction; taken off again, that is the nearest integer.
_ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**23)


@triton.jit
def quantize(vector):  # noqa: ANN201 - a kernel's
    """vector: float32.  Returns int8 numbers and their float16 scale, NaN if one is not finite."""
    # The maximum skips NaN; a sum does not, and 0 * inf is NaN.
    largest = tl.max(tl.abs(vector), 0) + tl.sum(vector * 0.0, 0)
    scale = (largest * _INVERSE).to(tl.float16)
    is_low = scale.to(tl.float32) * 127.0 < largest
    bits = scale.to(tl.int16, bitcast=True) + is_low.to(tl.int16)
    scale = bits.to(tl.float16, bitcast=True)  # the next float16 above
    divisor = scale.to(tl.float32)
    quotient = tl.where(divisor > 0, tl.div_rn(vector, tl.where(divisor > 0, divisor, 1.0)), 0.0)
    levels = (quotient + _ROUNDER) - _ROUNDER
    return levels.to(tl.int8), scale
