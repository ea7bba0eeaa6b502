"""The last w queries of a running sequence, layer by layer: its observation window."""

import torch
from torch import Tensor

from winnow.kv import ModelShape


class QueryRing:
    """A ring of w queries per layer and head, after RoPE, seeded from the prompt's window."""

    def __init__(self, shape: ModelShape, window_size: int, device: torch.device) -> None:
        size = (shape.num_layers, shape.num_heads, window_size, shape.head_dim)
        self._queries = torch.zeros(size, dtype=shape.dtype, device=device)
        self._window_size = window_size
        self._count = 0

    def seed(self, layer_idx: int, window_queries: Tensor) -> None:
        """Takes a layer's window queries [num_heads, <= w, head_dim], oldest first."""
        self._count = window_queries.shape[1]
        self._queries[layer_idx, :, : self._count] = window_queries

    def push(self, queries: Tensor) -> None:
        """Takes the newest token's queries of all layers: [L, num_heads, head_dim]."""
        self._queries[:, :, self._count % self._window_size] = queries
        self._count += 1

    def ordered(self, layer_idx: int) -> Tensor:
        """The layer's queries, oldest first: [num_heads, min(count, w), head_dim]."""
        queries = self._queries[layer_idx]
        if self._count <= self._window_size:
            return queries[:, : self._count]
        return queries.roll(-(self._count % self._window_size), dims=1)

    def copy(self) -> "QueryRing":
        """An independent ring with the same content (for a second sequence of one prompt)."""
        twin = object.__new__(QueryRing)
        twin._queries, twin._count = self._queries.clone(), self._count
        twin._window_size = self._window_size
        return twin
