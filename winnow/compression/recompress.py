"""Which entries recompression keeps of many heads at once."""

import torch
from torch import Tensor

from winnow.compression.base import RecompressionRule
from winnow.compression.heads import PagedHeads


def entries_to_keep(
    heads: PagedHeads, rule: RecompressionRule, budgets: Tensor, smallest: int, largest: int
) -> Tensor:
    """The entries that each head keeps: those of its window, and the best by the rule's scores.

    budgets: [N], more than w and less than the head's entries, between `smallest` and `largest`.
    Returns [N, largest] int64, of which a head's first `budgets` count, ascending.
    """
    return heads.best_entries(rule.scores(heads), budgets, smallest, largest)


def best_entries(
    scores: Tensor, lengths: Tensor, window: int, budgets: Tensor, smallest: int, largest: int
) -> Tensor:
    """As `entries_to_keep`, of heads with these scores [N, T], which are not needed any more.

    lengths: [N] entries, the last `window` of them the window's.
    """
    entry = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill_(entry >= (lengths - window)[:, None], torch.inf)
    scores = scores.masked_fill_(entry >= lengths[:, None], -torch.inf)
    is_kept = _best(scores, budgets, smallest, largest)
    rank = torch.where(is_kept, is_kept.cumsum(-1) - 1, largest)
    kept = rank.new_zeros(len(scores), largest + 1)  # the last column is for what is not kept
    return kept.scatter_(1, rank, entry.expand_as(rank))[:, :largest].contiguous()


def _best(scores: Tensor, budgets: Tensor, smallest: int, largest: int) -> Tensor:
    """Whether an entry is of its head's `budgets` best, the earlier of equal ones: [N, T] bool.

    Selects instead of sorting, which takes a CPU four times as long.
    """
    # A head with a smaller budget is filled up to the largest with what is better than all else.
    missing = torch.arange(largest - smallest, device=scores.device) < (largest - budgets)[:, None]
    filler = torch.full_like(missing, -torch.inf, dtype=scores.dtype)
    filled = torch.cat([scores, filler.masked_fill_(missing, torch.inf)], dim=1)
    least = filled.topk(largest, dim=1, sorted=False).values.amin(1, keepdim=True)
    is_above, is_equal = scores > least, scores == least
    room = budgets[:, None] - is_above.sum(1, keepdim=True)
    return is_above | (is_equal & (is_equal.cumsum(1) <= room))
