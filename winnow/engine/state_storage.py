"""The states of recurrent layers: one of each row of the batch, however long its sequence is."""

import torch
from torch import Tensor

from winnow.kv import LayerKV, ModelShape
from winnow.layer_state import LayerState


class StateStorage:
    """States of `num_rows` rows, and of one more that belongs to nobody.

    Every method may be called from any thread; concurrent writes must be to different rows.
    """

    def __init__(self, shape: ModelShape, num_rows: int, device: torch.device) -> None:
        self._parts = shape.states
        # Not initialized: a row's are written before they are read.
        self._tensors = [
            tuple(
                torch.empty((num_rows + 1, *part.shape), dtype=part.dtype, device=device)
                for part in parts
            )
            for parts in shape.states
        ]
        self.empty_dummy()

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for tensors in self._tensors for held in tensors)

    def empty_dummy(self) -> None:
        """Have the last row, nobody's, as before a first token, whatever steps made of it."""
        for tensors in self._tensors:
            for held in tensors:
                held[-1].zero_()

    def write(self, row: int, layer: LayerKV) -> None:
        """Replace the row's state of the layer with a copy of `layer`'s."""
        for held, state in zip(self._tensors[layer.layer_idx], layer.states, strict=True):
            held[row].copy_(state, non_blocking=True)

    def read(self, row: int, layer_idx: int) -> tuple[Tensor, ...]:
        """A copy of the row's state of the layer; empty if it has none."""
        return tuple(held[row].clone() for held in self._tensors[layer_idx])

    def gather(self, rows: Tensor, layer_idx: int) -> LayerState | None:
        """A copy of the rows' states, to be changed; None if the layer has none.  rows: [B]."""
        tensors = self._tensors[layer_idx]
        if not tensors:
            return None
        copies = tuple(held.index_select(0, rows) for held in tensors)
        return LayerState(self._parts[layer_idx], copies)

    def scatter(self, rows: Tensor, layer_idx: int, state: LayerState) -> None:
        """Replace the rows' states."""
        for held, tensor in zip(self._tensors[layer_idx], state.tensors, strict=True):
            held.index_copy_(0, rows, tensor)
