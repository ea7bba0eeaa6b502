"""The same number of entries in each KV head, those the window attends to (arXiv 2404.14469)."""

from torch import Tensor

from winnow.scoring import descending_order, pooled_scores, sum_head_groups, with_window


def keep_best(
    mass: Tensor, num_kv_heads: int, window_size: int, kernel_size: int, kv_budget: int
) -> list[Tensor]:
    """Per KV head, the `kv_budget - window_size` best entries and the window, ascending.

    mass: [num_heads, num_tokens] observed attention, num_tokens > kv_budget > window_size.
    Returns num_kv_heads tensors [kv_budget] int64.
    """
    scores = sum_head_groups(pooled_scores(mass, window_size, kernel_size), num_kv_heads)
    best = descending_order(scores)[:, : kv_budget - window_size]
    return [with_window(head, mass.shape[1], window_size) for head in best]
