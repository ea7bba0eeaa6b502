"""Attention temperatures: factors of the queries of layers without rotary tables.

They grow with a token's position (arXiv 2501.19399). transformers' layers count it from what their
cache holds, or take the factors from the model. Winnow's have no such cache, and pass a few tokens
at any positions, so the factors are multiplied here.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from winnow.attention.calls import AttentionCall
from winnow.attention.options import AttentionOptions

HANDED = "attention_scaling"  # by this name a model hands its layers such factors

# Factors [B, 1, T, 1] float32 for queries [B, H, T, D] at positions [B, T].
Temperature = Callable[[Tensor], Tensor]


def take_temperature(body: Any, layer: Any, *, has_table: bool) -> Temperature | None:  # noqa: ANN401
    """That of one of a body's layers, which no longer computes it itself; None without one.

    has_table: whether the layer has a rotary table.
    """
    attention: Any = getattr(layer, "self_attn", None)
    if getattr(attention, "attn_temperature_tuning", False):
        attention.attn_temperature_tuning = False
        if attention.use_rope:
            return None
        return partial(_by_steps, length=attention.floor_scale, scale=attention.attn_scale)
    if has_table:
        return None
    return getattr(sys.modules[type(body).__module__], "compute_attention_scaling", None)


def _by_steps(positions: Tensor, length: float, scale: float) -> Tensor:
    """1 + scale * ln(1 + s), with s the number of whole `length`s up to the position."""
    steps = torch.floor((positions.float() + 1) / length)
    return (1 + scale * torch.log1p(steps))[:, None, :, None]


def with_factors(attention: AttentionCall, factors: Tensor) -> AttentionCall:
    """The attention of queries [B, H, T, D] that are multiplied by factors [B, 1, T, 1]."""

    def call(
        layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return attention(layer_idx, (query * factors).to(query.dtype), key, value, options)

    return call
