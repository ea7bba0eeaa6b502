"""Prefill attention: causal attention within one prompt, of all its tokens or some."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# Queries that share a mask. More need more memory, and compute more keys that the mask then hides.
_MASKED_QUERIES = 512
# Up to this share of tokens without queries, it is quicker to compute them too than to mask.
_PADDED_SHARE = 0.4


class PrefillAttention:
    """An AttentionCall for one prompt that keeps what scoring and the KV cache need.

    It is called for the last T of the prompt's N tokens.

    After the layer ran: `keys`, `values` [num_kv_heads, N, head_dim], `queries`
    [num_heads, min(num_queries, T), head_dim] of the last tokens (`num_queries` None: of all), and
    `scaling` of the attention logits.

    cached: keys and values [2, num_kv_heads, N, head_dim], without those of the last T tokens,
    which are filled in; None if T = N.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float

    def __init__(self, num_queries: int | None, cached: Tensor | None = None) -> None:
        self._num_queries = num_queries
        self._cached = cached

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if self._cached is not None:
            self._cached[:, :, -key.shape[2] :] = torch.cat([key, value])
            key, value = self._cached[:, None]  # [1, H_kv, N, D] each
        self.observe(query, key, value, scaling)
        return causal_attention(query, key, value, scaling)

    def observe(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Keeps what is wanted of a layer; of `query` the last tokens' at least."""
        self.keys, self.values, self.scaling = key[0], value[0], scaling
        last = slice(None) if self._num_queries is None else slice(-self._num_queries, None)
        self.queries = query[0, :, last].contiguous()

    def looks_at_most_at(self, num_queries: int) -> bool:
        """Whether the last `num_queries` tokens' queries are all that is wanted."""
        return self._num_queries is not None and self._num_queries <= num_queries


class ScatteredAttention:
    """An AttentionCall for some tokens of a prompt, whose keys and values are all cached.

    cached: [2, num_kv_heads, N, head_dim] of the prompt's first N tokens.
    positions: [T] int64, ascending, below N, of the tokens that it is called for.
    """

    def __init__(self, cached: Tensor, positions: Tensor) -> None:
        self._cached = cached
        self._positions = positions

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        key, value = self._cached[:, None]  # [1, H_kv, N, D] each
        return _masked_attention(query, key, value, self._positions, scaling)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal self-attention of the last T of N tokens, by PyTorch's fused kernels.

    query: [B, H, T, D].  key, value: [B, H_kv, N, D].  Returns [B, H, T, D].
    The kernels work in blocks of queries and keys, so no T x N matrix is held.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_grouped = query.shape[1] != key.shape[1]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=num_queries > 1, scale=scaling, enable_gqa=is_grouped
        )
    if query.is_cuda and query.dtype != torch.float32:  # flash attention has no float32
        mask: Any = causal_lower_right(num_queries, num_keys)  # a hint; no mask is made of it
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
        )
    num_cached = num_keys - num_queries
    if num_cached <= _PADDED_SHARE * num_keys:
        padded = F.pad(query, (0, 0, num_cached, 0))
        return causal_attention(padded, key, value, scaling)[:, :, num_cached:]
    positions = torch.arange(num_cached, num_keys, device=query.device)
    return _masked_attention(query, key, value, positions, scaling)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float
) -> Tensor:
    """Attention of tokens at ascending `positions` [T] to the keys up to their own.

    Shapes as in `causal_attention`.  A mask is held for _MASKED_QUERIES queries at a time.
    """
    num_groups = query.shape[1] // key.shape[1]
    if query.is_cuda and num_groups > 1:  # its fused kernels take no mask with grouped heads
        key, value = (part.repeat_interleave(num_groups, dim=1) for part in (key, value))
    output = torch.empty_like(query)
    for start in range(0, len(positions), _MASKED_QUERIES):
        rows = positions[start : start + _MASKED_QUERIES]
        num_keys = int(rows[-1]) + 1
        mask = torch.arange(num_keys, device=query.device) <= rows[:, None]  # [rows, num_keys]
        output[:, :, start : start + len(rows)] = F.scaled_dot_product_attention(
            query[:, :, start : start + len(rows)],
            key[:, :, :num_keys],
            value[:, :, :num_keys],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output
