"""Selection by the last token's raw attention scores (GemFilter, arXiv 2409.17422)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.scoring import descending_order, with_window

_KERNEL_SIZE = 5


def most_relevant(last_query: Tensor, keys: Tensor, select_tokens: int) -> Tensor:
    """The best `select_tokens` tokens by q·k, before softmax, summed over heads and pooled.

    last_query: [num_heads, head_dim] of the last token.  keys: [num_kv_heads, N, head_dim],
    N > select_tokens.  Returns [select_tokens] int64, ascending.
    The last token is always included, which the paper leaves open: decode starts from its hidden
    state.
    """
    num_kv_heads, num_tokens, head_dim = keys.shape
    # Heads of a group share their key, so their queries are summed first: [num_kv_heads, head_dim].
    queries = last_query.float().view(num_kv_heads, -1, head_dim).sum(1)
    raw = torch.einsum("hd,hnd->n", queries, keys.float())
    scores = F.avg_pool1d(raw[None], _KERNEL_SIZE, stride=1, padding=_KERNEL_SIZE // 2)[0]
    best = descending_order(scores[:-1])[: select_tokens - 1]
    return with_window(best, num_tokens, window_size=1)
