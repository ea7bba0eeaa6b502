"""The gated activation between an MLP's products."""

import torch
from torch import Tensor

from winnow.kernels.cpu.library import LANES, library, require


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `winnow.kernels.activation.silu_mul`."""
    require(gate_up=gate_up)
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert size % LANES == 0, f"{size} numbers are not whole vectors of {LANES}"
    output = gate_up.new_empty((num_tokens, size))
    library().winnow_silu_mul(
        gate_up.data_ptr(), output.data_ptr(), num_tokens, size, torch.get_num_threads()
    )
    return output
