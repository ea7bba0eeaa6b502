"""Recompression of one layer during decode, scored by the queries of the last tokens."""

import torch
from torch import Tensor

from winnow.compression import RecompressionRule
from winnow.kv import LayerKV


def recompress_layer(
    layer: LayerKV, scaling: float, rule: RecompressionRule, budget: int
) -> LayerKV:
    """The layer with each KV head reduced to the `budget` entries that `rule` keeps.

    `layer.window_queries` are the queries of the last w tokens, whose entries (the last w of each
    head) are always kept. Heads within the budget are unchanged.
    """

    def kept_of_head(keys: Tensor, queries: Tensor) -> Tensor:
        """keys: [T, D] of one KV head; queries: [group, w, D].  Returns ascending indices."""
        if len(keys) <= budget:
            return torch.arange(len(keys), device=keys.device)
        return rule.keep(keys, queries, scaling, budget)

    groups = layer.window_queries.chunk(len(layer.head_lengths))  # each [group, w, D]
    kept = [
        rows.start + kept_of_head(layer.keys[rows], queries)
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
