"""Products with packed weights: of one row as fast as memory is read, of many as by oneDNN."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.cpu.library import library, require

_PANEL = 64  # outputs that are packed together


class Linear(ctypes.Structure):
    """As in packed_layer.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("panels", "scales", "bias"))


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """packed: see `pack`.  bias: bfloat16 [out].  scales: float32 [out], of int8 weights."""

    packed: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None

    def addresses(self) -> Linear:
        """Where its tensors are, which must stay there."""
        parts = (self.packed, self.scales, self.bias)
        return Linear(*(None if part is None else part.data_ptr() for part in parts))


def pack(weight: Tensor) -> Tensor:
    """weight: [out, in], bfloat16 or int8.

    Returns [ceil(out / 64), in / 2, 64, 2], zeros after the last output.
    """
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // _PANEL)
    packed = weight.new_zeros((num_panels, num_inputs // 2, _PANEL, 2))
    for start in range(0, num_outputs, _PANEL):
        rows = weight[start : start + _PANEL]
        pairs = rows.view(len(rows), -1, 2).transpose(0, 1)  # [in / 2, rows, 2]
        packed[start // _PANEL, :, : len(rows)] = pairs
    return packed


def rows_of(packed: Tensor, indices: Tensor) -> Tensor:
    """Some rows of the weight that was packed.  indices: int64.  Returns [*indices.shape, in]."""
    two = torch.int32 if packed.element_size() == 2 else torch.int16
    pairs = packed.view(two)[..., 0]  # [panels, in / 2, 64]
    return pairs[indices // _PANEL, :, indices % _PANEL].view(packed.dtype)


def linear(inputs: Tensor, product: Product, num_outputs: int) -> Tensor:
    """inputs: [T, in].  Returns [T, out], of which a row does not depend on the rows beside it."""
    require(inputs=inputs)
    outputs = inputs.new_empty((len(inputs), num_outputs))
    library().winnow_linear(
        inputs.data_ptr(),
        ctypes.byref(product.addresses()),
        outputs.data_ptr(),
        *outputs.shape,
        inputs.shape[1],
        torch.get_num_threads(),
    )
    return outputs
