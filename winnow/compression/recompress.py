"""The cache cut while decoding, by what the last generated tokens' queries attend to."""

import torch
from torch import Tensor

from winnow.compression import RecompressionRule
from winnow.kv import LayerKV


def recompress_layer(
    layer: LayerKV, scaling: float, rule: RecompressionRule, budget: int
) -> LayerKV:
    """The layer with every head that is longer cut to the `budget` entries that `rule` keeps.

    `layer.window_queries` are the last w tokens' queries; those tokens' entries, the last w of each
    head, always stay. Shorter heads stay as they are.
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
