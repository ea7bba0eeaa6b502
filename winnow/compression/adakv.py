"""AdaKV (arXiv 2407.11550): a layer's budget is distributed over its KV heads by their scores."""

from torch import Tensor

from winnow.compression.base import BudgetRule
from winnow.scoring import descending_order, pooled_scores, sum_head_groups, with_window

# The safeguard alpha is 1 / 5: every head gets at least this share of the budget.
_ALPHA_PARTS = 5


class AdaKVRule(BudgetRule):
    """Keeps `kv_budget` entries per head on average, more in heads with more of the best ones."""

    def max_entries(self, num_tokens: int, num_kv_heads: int) -> int:
        if self.keeps_all(num_tokens):
            return num_tokens
        return most_entries(num_tokens, num_kv_heads, self.settings.window_size, self.kv_budget)

    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        settings = self.settings
        return keep_shared(
            mass, num_kv_heads, settings.window_size, settings.kernel_size, self.kv_budget
        )


def keep_shared(
    mass: Tensor, num_kv_heads: int, window_size: int, kernel_size: int, kv_budget: int
) -> list[Tensor]:
    """Per KV head, the best entries within its share of the budget, and the window, ascending.

    mass: [num_heads, num_tokens] observed attention, num_tokens > kv_budget > window_size.
    Returns num_kv_heads tensors int64 of different lengths that sum to num_kv_heads * kv_budget.
    """
    scores = sum_head_groups(pooled_scores(mass, window_size, kernel_size), num_kv_heads)
    budgets = _head_budgets(scores, kv_budget - window_size)
    order = descending_order(scores)
    return [
        with_window(head[:budget], mass.shape[1], window_size)
        for head, budget in zip(order, budgets, strict=True)
    ]


def most_entries(num_tokens: int, num_kv_heads: int, window_size: int, kv_budget: int) -> int:
    """The most entries that one head keeps: if all of the layer's best are its own."""
    budget = kv_budget - window_size
    fifths = (_ALPHA_PARTS - 1) * min(num_kv_heads * budget, num_tokens - window_size) + budget
    return window_size - -fifths // _ALPHA_PARTS


def _head_budgets(scores: Tensor, budget: int) -> list[int]:
    """(1 - alpha) B_i + alpha B, where head i has B_i of the layer's best entries; B is `budget`.

    scores: [num_kv_heads, n], budget < n.  Entries lost to rounding down go to the heads that lost
    most, so that the sum is num_kv_heads * budget.
    """
    num_kv_heads, num_entries = scores.shape
    total = num_kv_heads * budget
    best = descending_order(scores.flatten())[:total]
    counts = (best // num_entries).bincount(minlength=num_kv_heads).tolist()  # B_i
    fifths = [(_ALPHA_PARTS - 1) * count + budget for count in counts]
    budgets = [own // _ALPHA_PARTS for own in fifths]
    by_loss = sorted(range(num_kv_heads), key=lambda head: -(fifths[head] % _ALPHA_PARTS))
    for head in by_loss[: total - sum(budgets)]:
        budgets[head] += 1
    return budgets
