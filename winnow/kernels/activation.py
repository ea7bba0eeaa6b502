"""The gated activation between an MLP's products."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the gate times the other half.  gate_up: [T, 2 * n], the gate first.  [T, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
