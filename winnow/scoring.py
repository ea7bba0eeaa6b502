"""Token scores and ranks from the attention of the last prompt tokens (the observation window).

The formulas are in docs/architecture.md, with the symbols of SnapKV (arXiv 2404.14469) and ASL
(arXiv 2601.07667): window w, N tokens, n = N - w.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.kernels.softmax import softmax
from winnow.visibility import first_keys

if TYPE_CHECKING:
    from winnow.attention import AttentionOptions  # loads transformers

_QUERY_BLOCK = 256


def observed_attention(
    window_queries: Tensor,
    keys: Tensor,
    options: "AttentionOptions",
    row_weights: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention that each token receives from the window, summed over the window's rows.

    window_queries: [num_heads, w, head_dim], of the last w tokens, after RoPE.
    keys: [num_kv_heads, N, head_dim], after RoPE.
    options: of the layer, whose attention this is.
    row_weights: [w] float32, weight of each row; None: 1.
    positions: [N] of the tokens, ascending; None: 0 to N - 1.
    Returns [num_heads, N] float32; each head sums to the sum of the weights (w without weights),
    but for what its sink gets.
    Peak memory: [group, w, N] of one KV head.
    """
    num_heads, window, head_dim = window_queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    queries = window_queries.view(num_kv_heads, -1, head_dim)  # [H_kv, group * w, D]
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu_(1)
    own = torch.arange(num_tokens - window, num_tokens, device=keys.device)
    firsts = first_keys(options.layer, own, positions)
    past = (
        None if firsts is None else torch.arange(num_tokens, device=keys.device) < firsts[:, None]
    )
    sinks = options.grouped_sinks(num_kv_heads)
    mass = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=keys.device)
    for head, out in enumerate(mass.view(num_kv_heads, -1, num_tokens)):
        logits = options.logits((queries[head] @ keys[head].T).float())  # [group * w, N]
        logits = logits.view(-1, window, num_tokens)
        logits[:, :, -window:].masked_fill_(future, -torch.inf)
        if past is not None:
            logits.masked_fill_(past, -torch.inf)
        attention = softmax(logits, None if sinks is None else sinks[head])
        if row_weights is not None:
            attention *= row_weights[:, None]
        torch.sum(attention, dim=1, out=out)
    return mass


def accumulated_attention(queries: Tensor, keys: Tensor, options: "AttentionOptions") -> Tensor:
    """Attention that each token receives from itself and all tokens after it.

    queries: [num_heads, N, head_dim] and keys: [num_kv_heads, N, head_dim], after RoPE.
    options: as for `observed_attention`.
    Returns [num_heads, N] float32; each head sums to N, but for what its sink gets.
    Peak memory: [group, _QUERY_BLOCK, N] of one KV head.
    """
    num_heads, num_tokens, _ = queries.shape
    mass = torch.zeros(num_heads, num_tokens, dtype=torch.float32, device=keys.device)
    for start in range(0, num_tokens, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, num_tokens)
        block = queries[:, start:end].contiguous()
        mass[:, :end] += observed_attention(block, keys[:, :end], options)
    return mass


def pooled_scores(mass: Tensor, window_size: int, kernel_size: int) -> Tensor:
    """Scores of the tokens before the window, average-pooled over neighbours (P in the papers).

    mass: [num_heads, N] from `observed_attention`.  Returns [num_heads, n].
    """
    before_window = mass[:, : mass.shape[1] - window_size]
    return F.avg_pool1d(before_window, kernel_size, stride=1, padding=kernel_size // 2)


def sum_head_groups(scores: Tensor, num_kv_heads: int) -> Tensor:
    """Sum scores [num_heads, n] over each KV head's group: [num_kv_heads, n]."""
    return scores.view(num_kv_heads, -1, scores.shape[-1]).sum(1)


def descending_order(scores: Tensor) -> Tensor:
    """Indices by descending score along the last dimension; ties go to the earlier token.

    scores: [..., n].  Returns [..., n] int64.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)


def ranks_from_order(order: Tensor) -> Tensor:
    """Each token's rank, 1 for the best: the inverse of `order` [n], int64."""
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1, device=order.device)
    return ranks


def with_window(best: Tensor, num_tokens: int, window_size: int) -> Tensor:
    """The token indices `best` and the window's, ascending: [len(best) + window_size]."""
    window = torch.arange(num_tokens - window_size, num_tokens, device=best.device)
    return torch.cat([best.sort().values, window])
