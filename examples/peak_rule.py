"""A compression rule of your own in one file; docs/methods.md explains it."""

from torch import Tensor

from winnow.compression.base import BudgetRule
from winnow.scoring import descending_order, pooled_scores, with_window


class PeakRule(BudgetRule):
    """Of each KV head the entries that some head of its group attends to most, and the window."""

    def keep_some(self, mass: Tensor, num_kv_heads: int) -> list[Tensor]:
        num_tokens, window = mass.shape[1], self.settings.window_size
        scores = pooled_scores(mass, window, self.settings.kernel_size)  # [H, n]
        peaks = scores.view(num_kv_heads, -1, num_tokens - window).amax(1)  # [H_kv, n]
        best = descending_order(peaks)[:, : self.kv_budget - window]
        return [with_window(head, num_tokens, window) for head in best]
