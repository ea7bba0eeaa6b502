"""The KV cache of one prompt after prefill: ragged, with original positions.

KV heads of a layer may keep different entries, so a layer is stored flat: the entries of head 0 in
prompt order, then those of head 1, and so on.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Model dimensions that the KV cache depends on; `dtype` is the cache's."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype

    def kv_bytes(self, num_entries: int) -> int:
        """Bytes of keys and values for `num_entries` entries of one KV head."""
        return 2 * num_entries * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """The kept KV of one layer.

    keys, values: [num_entries, head_dim], keys after RoPE at their original positions.
    positions: [num_entries] int32, ascending within a head.
    head_lengths: entries per KV head; sums to num_entries.
    window_queries: [num_heads, window, head_dim], queries of the last prompt tokens after RoPE;
    decode seeds its query ring with them.
    """

    layer_idx: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    head_lengths: tuple[int, ...]
    window_queries: Tensor

    @property
    def num_entries(self) -> int:
        return int(self.keys.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions; window queries are not counted."""
        return int(self.keys.nbytes + self.values.nbytes + self.positions.nbytes)

    def to(self, device: str) -> "LayerKV":
        """The layer with its tensors on `device`; tensors already there are not copied."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            positions=self.positions.to(device),
            window_queries=self.window_queries.to(device),
        )

    def head_slices(self) -> list[slice]:
        """The rows of each KV head in `keys`, `values` and `positions`."""
        ends = list(accumulate(self.head_lengths))
        return [slice(end - n, end) for end, n in zip(ends, self.head_lengths, strict=True)]


def pack_layer(
    layer_idx: int,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    kept: list[Tensor],
    window_queries: Tensor,
) -> LayerKV:
    """A LayerKV that owns copies of the kept entries.

    keys, values: [num_kv_heads, num_tokens, head_dim]; positions: [num_tokens].
    kept: per KV head, ascending token indices [num_kept].
    """
    index = torch.cat(kept)
    head = torch.cat([torch.full_like(own, head_idx) for head_idx, own in enumerate(kept)])
    return LayerKV(
        layer_idx=layer_idx,
        keys=keys[head, index],
        values=values[head, index],
        positions=positions[index].to(torch.int32),
        head_lengths=tuple(len(k) for k in kept),
        window_queries=window_queries,
    )


@dataclass(frozen=True, slots=True)
class SequenceState:
    """State of a running sequence, besides its KV and its query window.

    next_position: of its next token, as in PrefillReport.
    recompressed_entries: of the whole request.  at_floor: the budget was lowered to decode_floor.
    """

    token_ids: tuple[int, ...]
    next_position: int
    recompressed_entries: int = 0
    at_floor: bool = False
