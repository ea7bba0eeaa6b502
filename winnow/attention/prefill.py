"""Prefill attention: causal attention within one prompt, of all its tokens or some."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from winnow.attention.fused import CUDNN_TOKENS, fused_kernels, takes_cudnn
from winnow.attention.masked import has_kernel, masked_attention
from winnow.attention.options import AttentionOptions
from winnow.kernels.cpu.attention import attend
from winnow.kv import stacked

# Up to this share of tokens without queries, it is quicker to compute them too than to mask.
_PADDED_SHARE = 0.4
_MOST_FLASH_NUMBERS = 256


class PrefillAttention:
    """An AttentionCall for one prompt that keeps what scoring and the KV cache need.

    It is called for the last T of the prompt's N tokens.

    After the layer ran: `keys`, `values` [num_kv_heads, N, key_dim or value_dim], `queries`
    [num_heads, min(num_queries, T), key_dim] of the last tokens (`num_queries` None: of all), and
    the `options` of the attention.

    cached: keys and values [2, num_kv_heads, N, D], as `stacked` makes them, without those of the
    last T tokens, which are filled in; None if T = N.
    positions: [N] int64, ascending; None: 0 to N - 1.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    options: AttentionOptions

    def __init__(
        self,
        num_queries: int | None,
        cached: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.num_queries = num_queries
        self.cached = cached
        self.positions = positions

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        if self.cached is not None:
            self.cached[:, :, -key.shape[2] :] = stacked(key[0], value[0])
            key, value = _both(self.cached, key, value)
        self.observe(query, key, value, options)
        return causal_attention(query, key, value, options, self.positions)

    def observe(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> None:
        """Keeps what is wanted of a layer; of `query` the last tokens' at least."""
        self.keys, self.values, self.options = key[0], value[0], options
        last = slice(None) if self.num_queries is None else slice(-self.num_queries, None)
        self.queries = query[0, :, last].contiguous()

    def looks_at_most_at(self, num_queries: int) -> bool:
        """Whether the last `num_queries` tokens' queries are all that is wanted."""
        return self.num_queries is not None and self.num_queries <= num_queries


class ScatteredAttention:
    """An AttentionCall for some tokens of a prompt, whose keys and values are all cached.

    cached: [2, num_kv_heads, N, D] of the prompt's first N tokens, as `stacked` makes them.
    positions: [T] int64, ascending, below N, of the tokens that it is called for.
    """

    def __init__(self, cached: Tensor, positions: Tensor) -> None:
        self.cached = cached
        self.positions = positions

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        key, value = _both(self.cached, key, value)
        return masked_attention(query, key, value, self.positions, options)


def _is_flash(key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's kernels that take grouped heads take vectors of these sizes."""
    return key.shape[-1] == value.shape[-1] <= _MOST_FLASH_NUMBERS


def _both(cached: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values [1, H_kv, N, numbers] that are stacked, of the sizes of these."""
    return cached[:1, ..., : key.shape[-1]], cached[1:, ..., : value.shape[-1]]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    positions: Tensor | None = None,
) -> Tensor:
    """Causal self-attention of the last T of N tokens, by our kernel or PyTorch's fused ones.

    query: [B, H, T, D].  key: [B, H_kv, N, D].  value: [B, H_kv, N, E].  Returns [B, H, T, E].
    positions: [N] of all tokens, ascending; None: 0 to N - 1.
    The kernels work in blocks of queries and keys, so no T x N matrix is held.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if positions is None and options.layer.window is not None:
        options = options.within(num_keys)
    if not options.is_plain:
        first_own = num_keys - num_queries
        own = torch.arange(first_own, num_keys, device=query.device)
        return masked_attention(
            query, key, value, own, options, positions=positions, first_own=first_own
        )
    if has_kernel(query, key, value, options):
        own = torch.arange(num_keys - num_queries, num_keys)
        return attend(query[0], key[0], value[0], own, options.scaling)[None]
    is_grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and is_grouped and not _is_flash(key, value):
        group = query.shape[1] // key.shape[1]  # or no kernel takes it that holds no T x N matrix
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        is_grouped = False
    if num_queries == num_keys:
        return _of_whole_prompt(query, key, value, options.scaling, is_grouped=is_grouped)
    if query.is_cuda and query.dtype != torch.float32:  # flash attention has no float32
        mask: Any = causal_lower_right(num_queries, num_keys)  # a hint; no mask is made of it
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=options.scaling, enable_gqa=is_grouped
        )
    num_cached = num_keys - num_queries
    if num_cached <= _PADDED_SHARE * num_keys:
        padded = F.pad(query, (0, 0, num_cached, 0))
        return causal_attention(padded, key, value, options)[:, :, num_cached:]
    own = torch.arange(num_cached, num_keys, device=query.device)
    return masked_attention(query, key, value, own, options, first_own=num_cached)


def _of_whole_prompt(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, is_grouped: bool
) -> Tensor:
    num_tokens = query.shape[2]
    by_cudnn = takes_cudnn(query)
    if by_cudnn and (missing := -num_tokens % CUDNN_TOKENS):
        # None of the prompt's tokens sees those behind it.
        query, key, value = (F.pad(part, (0, 0, 0, missing)) for part in (query, key, value))
    with fused_kernels(query.device, cudnn_first=by_cudnn):
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=is_grouped
        )
    return output[:, :, :num_tokens]
