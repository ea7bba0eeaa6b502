"""Ring buffer of a running sequence's last w queries per full layer: its observation window.

L counts the full layers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from winnow.engine.kv_pool import KVPool
from winnow.engine.page_table import Slots
from winnow.kv import padded
from winnow.to_device import indices_to_device, tensor_to_device


class QueryRing:
    """A ring of w queries per full layer and head, after RoPE, seeded from the prompt's window.

    Stored in pages of the sequence's row; lost when the row is cleared. Slots are indices in the
    pool's `vectors`.
    """

    def __init__(self, pool: KVPool, row: int, window_size: int) -> None:
        # A token's queries lie side by side in memory, because they are written together.
        self._layers = {layer_idx: at for at, layer_idx in enumerate(pool.shape.full_layers)}
        size = (window_size, len(self._layers), pool.shape.num_heads)
        slots = pool.place_queries(row, num_queries(pool, window_size)).reshape(size)
        self._slots = slots.transpose(1, 2, 0)
        self._vectors = pool.vectors
        self._sizes = pool.shape.sizes
        self._kv_idx = pool.kv_idx
        self.window_size = window_size
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the queries of a full ring."""
        return self._slots.size * self._vectors.shape[1] * self._vectors.itemsize

    @property
    def num_tokens(self) -> int:
        """Tokens whose queries it holds, at most w."""
        return min(self._count, self.window_size)

    def seed(self, layer_idx: int, window_queries: Tensor) -> None:
        """Store a full layer's window queries [num_heads, <= w, key_dim], oldest first.

        Those of another layer are not wanted.
        """
        if layer_idx not in self._layers:
            return
        self._count = window_queries.shape[1]
        queries = tensor_to_device(window_queries, self._vectors.device)
        (slots,) = indices_to_device(
            [self._slots[self._layers[layer_idx], :, : self._count]], queries.device
        )
        self._vectors[slots] = padded(queries, self._vectors.shape[1])

    def advance(self) -> Slots:
        """Where the newest token's queries of all full layers go: [L_full, num_heads]."""
        self._count += 1
        return self._slots[:, :, (self._count - 1) % self.window_size]

    def ordered_slots(self) -> Slots:
        """Where the queries are, oldest first: [L_full, num_heads, num_tokens]."""
        if self._count <= self.window_size:
            return self._slots[:, :, : self._count]
        return np.roll(self._slots, -(self._count % self.window_size), axis=2)

    def ordered(self, layer_idx: int) -> Tensor:
        """The layer's queries, oldest first: [num_heads, num_tokens, key_dim].

        Of a layer that is not full it has none.
        """
        slots = self.ordered_slots()
        own = slots[self._layers[layer_idx]] if layer_idx in self._layers else slots[0, :, :0]
        (own,) = indices_to_device([own], self._vectors.device)
        return self._vectors[own][..., : self._sizes[layer_idx].key_dim]


def push_queries(
    pool: KVPool, rings: Mapping[int, QueryRing], layers: Sequence[Tensor] | Tensor
) -> None:
    """Add the newest token's queries to the rings of some of B rows, by their index in the batch.

    layers: [B, num_heads, key_dim] of each layer with keys and values.
    """
    queries = torch.stack([layers[layer_idx] for layer_idx in pool.windows.full])
    new_slots = np.stack([ring.advance() for ring in rings.values()], axis=1)  # [L, b, num_heads]
    if len(rings) < queries.shape[1]:
        queries = queries.index_select(1, *indices_to_device([list(rings)], pool.device))
    (slots,) = indices_to_device([new_slots], pool.device)
    pool.vectors[slots] = padded(queries, pool.shape.head_dim)


def num_queries(pool: KVPool, window_size: int) -> int:
    """Number of queries that a ring holds."""
    return len(pool.windows.full) * pool.shape.num_heads * window_size
