"""The cache cut while decoding, by what the last generated tokens' queries attend to."""

import torch
from torch import Tensor

from winnow.compression.rkv import keep_diverse
from winnow.compression.snapkv import keep_best
from winnow.kv import LayerKV
from winnow.scoring import observed_attention


def recompress_layer(
    layer: LayerKV,
    scaling: float,
    kernel_size: int,
    decode_budget: int,
    *,
    method: str = "snapkv",
    redundancy_weight: float = 0.1,
) -> LayerKV:
    """The layer with every head that is longer cut to its `decode_budget` best entries.

    `layer.window_queries` are the last w tokens' queries; those tokens' entries, the last w of each
    head, always stay. Shorter heads stay as they are.
    method: one of `winnow.request.RECOMPRESSIONS`; `redundancy_weight` is for rkv.
    """

    def kept_of_head(keys: Tensor, queries: Tensor) -> Tensor:
        """keys: [T, D] of one KV head; queries: [group, w, D].  Returns ascending indices."""
        if len(keys) <= decode_budget:
            return torch.arange(len(keys), device=keys.device)
        if method == "rkv":
            return keep_diverse(
                keys, queries, scaling, kernel_size, decode_budget, redundancy_weight
            )
        mass = observed_attention(queries, keys[None], scaling)
        return keep_best(mass, 1, queries.shape[1], kernel_size, decode_budget)[0]

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
