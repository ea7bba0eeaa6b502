"""Ring buffer of a running sequence's last w queries per layer: its observation window."""

from torch import Tensor

from winnow.engine.kv_pool import KVPool
from winnow.to_device import tensor_to_device


class QueryRing:
    """A ring of w queries per layer and head, after RoPE, seeded from the prompt's window.

    Stored in pages of the sequence's row; lost when the row is cleared.
    """

    def __init__(self, pool: KVPool, row: int, window_size: int) -> None:
        size = (pool.shape.num_layers, pool.shape.num_heads, window_size)
        self._slots = pool.place_queries(row, num_queries(pool, window_size)).view(size)
        self._vectors = pool.vectors
        self._window_size = window_size
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the queries of a full ring."""
        return self._slots.numel() * self._vectors.shape[1] * self._vectors.itemsize

    def seed(self, layer_idx: int, window_queries: Tensor) -> None:
        """Store a layer's window queries [num_heads, <= w, head_dim], oldest first."""
        self._count = window_queries.shape[1]
        queries = tensor_to_device(window_queries, self._vectors.device)
        self._vectors[self._slots[layer_idx, :, : self._count]] = queries

    def push(self, queries: Tensor) -> None:
        """Add the newest token's queries of all layers: [L, num_heads, head_dim]."""
        self._vectors[self._slots[:, :, self._count % self._window_size]] = queries
        self._count += 1

    def ordered(self, layer_idx: int) -> Tensor:
        """The layer's queries, oldest first: [num_heads, min(count, w), head_dim]."""
        slots = self._slots[layer_idx]
        if self._count <= self._window_size:
            return self._vectors[slots[:, : self._count]]
        return self._vectors[slots.roll(-(self._count % self._window_size), dims=1)]


def num_queries(pool: KVPool, window_size: int) -> int:
    """Number of queries that a ring holds."""
    return pool.shape.num_layers * pool.shape.num_heads * window_size
