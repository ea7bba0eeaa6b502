"""Reassembly of a received layer: a reused buffer, filled in order, then viewed as tensors."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from winnow.errors import TransferDamaged, TransferMalformed
from winnow.kv import LayerKV
from winnow.wire.framing import DataFrame
from winnow.wire.payload import Segment

_CPU = torch.device("cpu")


class ReceiveBuffer:
    """Memory for one layer's payload, reused for the next: new pages cost more than copying.

    device: where layers are copied to. For CUDA it is pinned, so that these copies need no wait;
    PyTorch then has several pieces in turn, and none before the copies from it are made.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._pinned = device.type == "cuda"
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """A buffer [num_bytes] uint8 with arbitrary content; invalidates the previous one."""
        if self._pinned or self._bytes.numel() < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:num_bytes]


@dataclass(slots=True)
class IncomingLayer:
    """A layer being received. payload: [payload bytes] uint8, written up to `filled`.

    segments: of the payload, the first `num_states` of them its state's.
    """

    layer_idx: int
    head_lengths: tuple[int, ...]
    segments: list[Segment]
    num_states: int
    payload: Tensor
    filled: int = 0

    @property
    def whole(self) -> bool:
        return self.filled == len(self.payload)

    def write(self, data: DataFrame) -> None:
        """Raises TransferDamaged for data out of turn, TransferMalformed for too much of it."""
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

    def views(self) -> LayerKV:
        """The tensors of the complete layer, as views of `payload`."""
        ends = accumulate(segment.num_bytes for segment in self.segments)
        tensors = {
            one.name: _view(self.payload[end - one.num_bytes : end], one)
            for one, end in zip(self.segments, ends, strict=True)
        }
        states = tuple(tensors[one.name] for one in self.segments[: self.num_states])
        return LayerKV(
            layer_idx=self.layer_idx,
            head_lengths=self.head_lengths,
            keys=tensors["keys"],
            values=tensors["values"],
            positions=tensors["positions"],
            window_queries=tensors["window_queries"],
            scales=tensors.get("scales"),
            states=states,
        )


def _view(payload: Tensor, segment: Segment) -> Tensor:
    if payload.storage_offset() % segment.dtype.itemsize:  # after a state of an odd length
        payload = payload.clone()
    return payload.view(segment.dtype).view(segment.shape)
