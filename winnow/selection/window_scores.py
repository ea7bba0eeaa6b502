"""Selection of the tokens that the observation window attends to most (FastKV, ASL)."""

from torch import Tensor

from winnow.pruning_settings import PruningSettings
from winnow.scoring import pooled_scores, with_window


def token_scores(mass: Tensor, settings: PruningSettings) -> Tensor:
    """One score per token before the window (s in docs/architecture.md): pooled, summed over heads.

    mass: [num_heads, N] observed attention.  Returns [n] float32.
    """
    return pooled_scores(mass, settings.window_size, settings.kernel_size).sum(0)


def best_tokens(order: Tensor, settings: PruningSettings) -> Tensor:
    """The first `select_tokens - window_size` of `order` [n], and the window, ascending."""
    window = settings.window_size
    best = order[: settings.select_tokens - window]
    return with_window(best, len(order) + window, window)
