"""Selection by the last token's raw attention scores (GemFilter, arXiv 2409.17422)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.scoring import descending_order, with_window

_KERNEL_SIZE = 5


def relevance(last_query: Tensor, keys: Tensor) -> Tensor:
    """q·k of the last token, before softmax, summed over each KV head's group.

    last_query: [num_heads, head_dim].  keys: [num_kv_heads, N, head_dim].
    Returns [num_kv_heads, N] float32.
    """
    num_kv_heads, _, head_dim = keys.shape
    # Heads of a group share their key, so their queries are summed first: [num_kv_heads, head_dim].
    queries = last_query.float().view(num_kv_heads, -1, head_dim).sum(1)
    return torch.einsum("hd,hnd->hn", queries, keys.float())


def most_relevant(relevance: Tensor, select_tokens: int) -> Tensor:
    """The best `select_tokens` tokens by relevance, summed over heads and pooled.

    relevance: [num_kv_heads, N], N > select_tokens.  Returns [select_tokens] int64, ascending.
    The last token is always included, which the paper leaves open: decode starts from its hidden
    state.
    """
    raw = relevance.sum(0, keepdim=True)
    scores = F.avg_pool1d(raw, _KERNEL_SIZE, stride=1, padding=_KERNEL_SIZE // 2)[0]
    best = descending_order(scores[:-1])[: select_tokens - 1]
    return with_window(best, relevance.shape[1], window_size=1)
