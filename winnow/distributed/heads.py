"""Which heads each rank has: rank r of N the r-th of N equal, consecutive shares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from winnow.errors import InvalidSetting
from winnow.kv import LayerKV, ModelShape

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Split:
    """One rank's place among `num_ranks`."""

    rank: int
    num_ranks: int

    def of(self, heads: Sequence[T]) -> Sequence[T]:
        """The rank's share of what there is one of per head."""
        own = self.heads(len(heads))
        return heads[own.start : own.stop]

    def heads(self, num_kv_heads: int) -> range:
        """The rank's KV heads."""
        count = num_kv_heads // self.num_ranks
        return range(self.rank * count, (self.rank + 1) * count)

    def shape(self, shape: ModelShape) -> ModelShape:
        """The model's shape with the heads of one rank."""
        return shape.part(shape.num_kv_heads // self.num_ranks)


def require_divides(num_ranks: int, shape: ModelShape) -> None:
    """Raise InvalidSetting unless every rank gets as many heads, and KV heads, as the others.

    Recurrent layers cannot be shared: their heads are others than those of attention. Nor can
    layers of several sizes: a rank has the same heads of each.
    """
    if num_ranks > 1 and (first := shape.first_smaller) is not None:
        raise InvalidSetting(
            f"tensor_parallel is {num_ranks}; it must be 1 for a model with keys and values of "
            f"several sizes, of which layer {first} has smaller ones than others",
            param="tensor_parallel",
        )
    if num_ranks > 1 and shape.has_states:
        first = next(idx for idx, layer in enumerate(shape.layers) if layer.is_recurrent)
        raise InvalidSetting(
            f"tensor_parallel is {num_ranks}; it must be 1 for a model with recurrent layers, of "
            f"which layer {first} is the first",
            param="tensor_parallel",
        )
    if shape.num_heads % num_ranks or shape.num_kv_heads % num_ranks:
        raise InvalidSetting(
            f"tensor_parallel is {num_ranks}; it must divide the model's {shape.num_heads} "
            f"attention heads and its {shape.num_kv_heads} KV heads",
            param="tensor_parallel",
        )


def split_heads(layer: LayerKV, num_ranks: int) -> list[LayerKV]:
    """The layer's heads by rank; the tensors are views."""
    num_kv_heads = len(layer.head_lengths)
    ranks = [Split(rank, num_ranks) for rank in range(num_ranks)]
    return [take_heads(layer, rank.heads(num_kv_heads)) for rank in ranks]


def take_heads(layer: LayerKV, heads: range) -> LayerKV:
    """The layer's KV heads of these numbers, and their query heads; the tensors are views."""
    own = slice(heads.start, heads.stop)
    start = sum(layer.head_lengths[: heads.start])
    rows = slice(start, start + sum(layer.head_lengths[own]))
    group = len(layer.window_queries) // len(layer.head_lengths)
    return replace(
        layer,
        keys=layer.keys[rows],
        values=layer.values[rows],
        positions=layer.positions[rows],
        head_lengths=layer.head_lengths[own],
        window_queries=layer.window_queries[group * heads.start : group * heads.stop],
        scales=None if layer.scales is None else layer.scales[rows],
    )


def join_heads(parts: list[LayerKV]) -> LayerKV:
    """The layer of which these are the ranks' heads, on the first part's device."""
    device = str(parts[0].keys.device)
    moved = [part.to(device) for part in parts]
    queries = str(parts[0].window_queries.device)
    scales = [part.scales for part in moved if part.scales is not None]
    return LayerKV(
        layer_idx=parts[0].layer_idx,
        keys=torch.cat([part.keys for part in moved]),
        values=torch.cat([part.values for part in moved]),
        positions=torch.cat([part.positions for part in moved]),
        head_lengths=tuple(length for part in parts for length in part.head_lengths),
        window_queries=torch.cat([part.window_queries.to(queries) for part in parts]),
        scales=torch.cat(scales) if scales else None,
    )
