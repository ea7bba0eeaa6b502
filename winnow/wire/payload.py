"""What a layer's payload consists of, in order: its state, then the other fields of a LayerKV."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from winnow.kv import KvDtype, ModelShape
from winnow.layer_state import StatePart

# int8 comes last: whatever its length, every tensor begins at a multiple of its numbers' size.
FIELDS: dict[KvDtype, tuple[str, ...]] = {
    "auto": ("positions", "keys", "values", "window_queries"),
    "int8": ("positions", "scales", "window_queries", "keys", "values"),
}


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor of a payload."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def state_segments(parts: Sequence[StatePart]) -> list[Segment]:
    """The tensors of a layer's state; they come first, whatever the codec."""
    return [Segment(f"state {idx}", part.shape, part.dtype) for idx, part in enumerate(parts)]


def segments(
    kv_dtype: KvDtype, shape: ModelShape, layer_idx: int, num_entries: int, window: int
) -> list[Segment]:
    """The tensors of a layer's payload, in order."""
    size = shape.sizes[layer_idx]
    vectors = torch.int8 if kv_dtype == "int8" else shape.dtype
    by_name = {
        segment.name: segment
        for segment in (
            Segment("positions", (num_entries,), torch.int32),
            Segment("scales", (num_entries, 2), torch.float16),
            Segment("keys", (num_entries, size.key_dim), vectors),
            Segment("values", (num_entries, size.value_dim), vectors),
            Segment("window_queries", (shape.num_heads, window, size.key_dim), shape.dtype),
        )
    }
    return [by_name[name] for name in FIELDS[kv_dtype]]
