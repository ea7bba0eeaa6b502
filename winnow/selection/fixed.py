"""Selection at a layer given in advance, as FastKV does (arXiv 2502.01068)."""

from torch import Tensor

from winnow.request import PruningSettings
from winnow.scoring import descending_order, pooled_scores, with_window
from winnow.selection.base import Selection


class FixedSelection:
    """Selects the best-scored tokens of layer `fixed_layer`."""

    rho: tuple[tuple[int, float], ...] = ()
    no_selection_reason = "threshold_not_met"

    def __init__(self, settings: PruningSettings) -> None:
        self._settings = settings

    def needs_scores(self, layer_idx: int) -> bool:
        return layer_idx == self._settings.fixed_layer

    def observe(self, layer_idx: int, mass: Tensor) -> Selection | None:
        if layer_idx != self._settings.fixed_layer:
            return None
        return select_best(descending_order(token_scores(mass, self._settings)), self._settings)


def token_scores(mass: Tensor, settings: PruningSettings) -> Tensor:
    """One score per token before the window (s of the formulas): pooled, summed over all heads.

    mass: [num_heads, N] observed attention.  Returns [n] float32.
    """
    return pooled_scores(mass, settings.window_size, settings.kernel_size).sum(0)


def select_best(order: Tensor, settings: PruningSettings) -> Selection:
    """Keeps the first `select_tokens - window_size` of `order` [n], and the window."""
    window = settings.window_size
    best = order[: settings.select_tokens - window]
    return Selection(with_window(best, len(order) + window, window))
