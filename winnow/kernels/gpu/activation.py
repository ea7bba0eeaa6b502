"""The gated activation between an MLP's products: a program per token and block of columns."""

import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, require_contiguous

_BLOCK = 1024
_NUM_WARPS = 4  # one vector of 16 bytes per thread


@triton.jit
def _silu_mul(gate_up_ptr, output_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up_ptr + row * 2 * size + at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * size + at, mask=inside, other=0.0)
    activated = gate.to(tl.float32)
    activated = (activated * tl.sigmoid(activated)).to(gate.dtype).to(tl.float32)
    output = (activated * up.to(tl.float32)).to(gate.dtype)
    tl.store(output_ptr + row * size + at, output, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `winnow.kernels.activation.silu_mul`."""
    require_contiguous(gate_up=gate_up)
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty((num_tokens, size))
    grid = (num_tokens, triton.cdiv(size, _BLOCK))
    _silu_mul[grid](gate_up, output, size, BLOCK=_BLOCK, num_warps=_NUM_WARPS, **FUSED)
    return output
