"""Rotary embedding of queries and keys, and their norms before it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """RMSNorm of each query and key head, as Qwen3 has it.  query, key: weights [D]."""

    query: Tensor
    key: Tensor
    eps: float


def rotate(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """Norm and rotate queries and keys in place, in float32.

    heads: [B, num_heads + 2 * num_kv_heads, D], a fused projection: queries, keys, values.
    cos, sin: [B, D] of each row's position, whose halves are equal.
    """
    queries, keys, _ = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    weights = (None, None) if norms is None else (norms.query, norms.key)
    for part, weight in zip((queries, keys), weights, strict=True):
        exact = part.float()
        if norms is not None and weight is not None:
            scale = exact.square().mean(-1, keepdim=True).add(norms.eps).rsqrt()
            exact = exact * scale * weight.float()
        first, second = exact.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        part.copy_(exact * cos[:, None].float() + turned * sin[:, None].float())
