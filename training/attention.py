"""Attention for training, registered with transformers as `training_matmul`.

Plain matrix products in query blocks, each over its causal prefix only: at these sizes the backward
pass of scaled_dot_product_attention is several times slower on a CPU.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "training_matmul"
QUERY_BLOCK = 256


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Attention causal by index (positions may have gaps); ignores the mask, as padding is last.

    query: [B, H, T, D].  key, value: [B, H_kv, T, D].  Returns [B, T, H, D].
    """
    batch, _, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query = (query * scaling).view(batch, num_kv_heads, -1, length, head_dim)  # [B, H_kv, G, T, D]
    blocks = [
        _attend_block(query[..., start : start + QUERY_BLOCK, :], key, value, start)
        for start in range(0, length, QUERY_BLOCK)
    ]
    output = torch.cat(blocks, dim=-2)  # [B, H_kv, G, T, D]
    return output.flatten(1, 2).transpose(1, 2), None


def _attend_block(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    rows = query.shape[-2]
    end = start + rows
    flat = query.flatten(2, 3)  # [B, H_kv, G * rows, D]
    logits = flat @ key[:, :, :end].transpose(-1, -2)  # [B, H_kv, G * rows, end]
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    mask = torch.zeros(rows, end, dtype=logits.dtype, device=query.device)
    mask[:, start:].masked_fill_(future, float("-inf"))
    logits = logits.view(*query.shape[:-1], end) + mask  # [B, H_kv, G, rows, end]
    weights = logits.softmax(dim=-1).flatten(2, 3)
    return (weights @ value[:, :, :end]).view_as(query)


def register() -> None:
    """Register `attn_implementation="training_matmul"` with transformers."""
    AttentionInterface.register(NAME, causal_attention)
