"""Prefill attention: causal attention within one prompt."""

import torch.nn.functional as F
from torch import Tensor


class PrefillAttention:
    """An AttentionCall for one prompt that keeps what scoring and the KV cache need.

    After the layer ran: `keys`, `values` [num_kv_heads, num_tokens, head_dim], `queries`
    [num_heads, min(num_queries, num_tokens), head_dim] of the last tokens (`num_queries` None: of
    all), and `scaling` of the attention logits.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float

    def __init__(self, num_queries: int | None) -> None:
        self._num_queries = num_queries

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
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


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal self-attention, by PyTorch's fused kernel.

    query: [B, H, T, D].  key, value: [B, H_kv, T, D].  Returns [B, H, T, D].
    The kernel works in blocks of queries and keys, so no T x T matrix is held.
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
