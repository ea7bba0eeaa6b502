"""SnapKV while decoding: the last generated tokens' queries score the cache, the rest is cut."""

import torch
from torch import Tensor

from winnow.compression.snapkv import keep_best
from winnow.kv import LayerKV
from winnow.scoring import observed_attention


def recompress_layer(
    layer: LayerKV, scaling: float, kernel_size: int, decode_budget: int
) -> LayerKV:
    """The layer with every head that is longer cut to its `decode_budget` best entries.

    `layer.window_queries` are the last w tokens' queries; those tokens' entries, the last w of each
    head, always stay. Shorter heads stay as they are.
    """
    groups = layer.window_queries.chunk(len(layer.head_lengths))  # each [group, w, D]
    kept = [
        rows.start + _kept_of_head(layer.keys[rows], queries, scaling, kernel_size, decode_budget)
        for rows, queries in zip(layer.head_slices(), groups, strict=True)
    ]
    index = torch.cat(kept)
    return LayerKV(
        layer_idx=layer.layer_idx,
        keys=layer.keys[index],
        values=layer.values[index],
        positions=layer.positions[index],
        head_lengths=tuple(len(head) for head in kept),
        window_queries=layer.window_queries,
    )


def _kept_of_head(
    keys: Tensor, queries: Tensor, scaling: float, kernel_size: int, decode_budget: int
) -> Tensor:
    """keys: [T, D] of one KV head; queries: [group, w, D].  Returns ascending indices."""
    if len(keys) <= decode_budget:
        return torch.arange(len(keys), device=keys.device)
    mass = observed_attention(queries, keys[None], scaling)
    return keep_best(mass, 1, queries.shape[1], kernel_size, decode_budget)[0]
