"""Reassembly of a received layer: a reused buffer, filled in order, then viewed as tensors."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from winnow.errors import TransferDamaged, TransferMalformed
from winnow.kv import LayerKV, ModelShape
from winnow.wire.framing import DataFrame


class ReceiveBuffer:
    """Memory for one layer's payload, reused for the next: new pages cost more than copying."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """A buffer [num_bytes] uint8 with arbitrary content; invalidates the previous one."""
        if self._bytes.numel() < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes]


@dataclass(slots=True)
class IncomingLayer:
    """A layer being received. payload: [payload bytes] uint8, written up to `filled`."""

    layer_idx: int
    head_lengths: tuple[int, ...]
    window: int
    payload: Tensor
    filled: int = 0

    @property
    def whole(self) -> bool:
        return self.filled == len(self.payload)

    def write(self, data: DataFrame) -> None:
        if (data.layer_idx, data.offset) != (self.layer_idx, self.filled):
            raise TransferDamaged(
                f"data of layer {data.layer_idx} at byte {data.offset} arrived; "
                f"layer {self.layer_idx} at byte {self.filled} is next"
            )
        end = data.offset + len(data.payload)
        if end > len(self.payload):
            raise TransferMalformed(
                f"layer {self.layer_idx} has {len(self.payload)} bytes; data goes on to {end}"
            )
        self.payload.numpy().data[data.offset : end] = data.payload
        self.filled = end

    def views(self, shape: ModelShape) -> LayerKV:
        """The tensors of the complete layer, as views of `payload`."""
        num_entries = sum(self.head_lengths)
        sizes = segment_bytes(shape, num_entries, self.window)
        positions, keys, values, queries = (
            self.payload[end - size : end]
            for size, end in zip(sizes, accumulate(sizes), strict=True)
        )
        return LayerKV(
            layer_idx=self.layer_idx,
            keys=keys.view(shape.dtype).view(num_entries, shape.head_dim),
            values=values.view(shape.dtype).view(num_entries, shape.head_dim),
            positions=positions.view(torch.int32),
            head_lengths=self.head_lengths,
            window_queries=queries.view(shape.dtype).view(
                shape.num_heads, self.window, shape.head_dim
            ),
        )


def segment_bytes(shape: ModelShape, num_entries: int, window: int) -> tuple[int, int, int, int]:
    """Bytes of positions, keys, values and window queries in a layer's payload."""
    row = shape.head_dim * shape.dtype.itemsize
    return 4 * num_entries, row * num_entries, row * num_entries, row * shape.num_heads * window
