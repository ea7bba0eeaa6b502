"""SnapKV's recompression for many (layer, KV head) pairs at once: score, choose, compact.

N heads of any lengths, in pages; no loop over them, and no length is read back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_scores(
    queries: Tensor, keys: Tensor, pages: Tensor, lengths: Tensor, scaling: float
) -> Tensor:
    """Attention that each entry receives from its head's window, summed over group and window.

    queries: [N, group, w, D], of the last w tokens.  keys: [num_pages, page_size, D].
    pages: [N, P] and lengths: [N] of each head, w or more entries.
    Returns [N, P * page_size] float32, 0 behind a head's last entry.
    """
    window = queries.shape[2]
    own = keys[pages].flatten(1, 2).float()  # [N, T, D]
    entry = torch.arange(own.shape[1], device=keys.device)
    query = torch.arange(window, device=keys.device)
    is_visible = entry <= (lengths[:, None] - window + query)[..., None]  # [N, w, T]
    # Where a page has no entry yet there may be anything, NaN included.
    own = own.masked_fill((entry >= lengths[:, None])[..., None], 0)
    logits = queries.float() @ own[:, None].mT * scaling  # [N, group, w, T]
    return logits.masked_fill(~is_visible[:, None], -torch.inf).softmax(-1).sum((1, 2))


def best_entries(
    scores: Tensor, lengths: Tensor, budget: int, window_size: int, kernel_size: int
) -> tuple[Tensor, Tensor]:
    """The entries that each head keeps, and how many: the best ones, and the window.

    scores: [N, T] as `window_scores` returns them.  Heads within the budget keep all.
    Returns [N, min(budget, T)] ascending indices, of which the first so many count, and
    [N] new lengths.  Ties go to the earlier entry.
    """
    num_before = (lengths - window_size)[:, None]
    entry = torch.arange(scores.shape[1], device=scores.device)
    before = scores.masked_fill(entry >= num_before, 0)[:, None]
    pooled = F.avg_pool1d(before, kernel_size, stride=1, padding=kernel_size // 2)[:, 0]
    is_sure = (entry >= num_before) | (lengths <= budget)[:, None]
    pooled = pooled.masked_fill(is_sure, torch.inf)
    pooled = pooled.masked_fill(entry >= lengths[:, None], -torch.inf)
    order = pooled.argsort(dim=-1, descending=True, stable=True)
    return order[:, :budget].sort(dim=-1).values, lengths.clamp_max(budget)


def compact(
    pool: tuple[Tensor, Tensor, Tensor], pages: Tensor, kept: Tensor, lengths: Tensor
) -> None:
    """Move each head's kept entries to the beginning of its pages.

    pool: keys and values [num_pages, page_size, D] and positions [num_pages, page_size], in place.
    kept: [N, K] ascending indices; the first `lengths` [N] of each head count.
    """
    page_size = pool[0].shape[1]
    slots = (pages[..., None] * page_size + torch.arange(page_size, device=pages.device)).flatten(1)
    rank = torch.arange(kept.shape[1], device=pages.device)
    counts = rank < lengths[:, None]
    source, target = slots.gather(1, kept)[counts], slots[:, : kept.shape[1]][counts]
    for part in pool:
        flat = part.view(-1, *part.shape[2:])
        flat[target] = flat[source]
