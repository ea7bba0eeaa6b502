"""Adaptive layer selection (arXiv 2601.07667): select tokens where their ranks have settled."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.pruning_settings import PruningSettings
from winnow.scoring import descending_order, ranks_from_order
from winnow.selection.window_scores import best_tokens, token_scores

# Divisor in place of a variance of 0 at min_layer, so that rho stays finite, as JSON requires.
_NO_VARIANCE = 1e-15


class AdaptiveSelection:
    """Selects at the first layer from `min_layer` on whose relative rank variance is below tau.

    The variance is over the last `observed_layers` full layers and over the tokens that at least
    one of them ranks among the k best, relative to the variance at the first full layer from
    `min_layer` on.
    latest_layer: selects here even if the variance is not below tau; None: no such layer.
    full_layers: of the model, ascending; it observes no others.
    """

    def __init__(
        self, settings: PruningSettings, latest_layer: int | None, full_layers: Sequence[int]
    ) -> None:
        self._settings = settings
        self._latest_layer = latest_layer
        num_before = bisect_left(full_layers, settings.min_layer)
        self._first_observed = full_layers[num_before + 1 - settings.observed_layers]
        self._ranks: deque[Tensor] = deque(maxlen=settings.observed_layers)  # each [n]
        self._first_variance: float | None = None
        self._rho: list[tuple[int, float]] = []

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        """(layer, relative rank variance) for each full layer from `min_layer` on."""
        return tuple(self._rho)

    def needs_scores(self, layer_idx: int) -> bool:
        """Whether `observe` needs this layer's attention."""
        return layer_idx >= self._first_observed

    def observe(self, layer_idx: int, mass: Tensor) -> Tensor | None:
        """Observe a layer's attention mass [num_heads, N]; returns selected tokens, ascending."""
        settings = self._settings
        order = descending_order(token_scores(mass, settings))
        self._ranks.append(ranks_from_order(order))
        if layer_idx < settings.min_layer:
            return None
        rho = self._relative(self._variance())
        self._rho.append((layer_idx, rho))
        if rho < settings.threshold or layer_idx == self._latest_layer:
            return best_tokens(order, settings)
        return None

    def _variance(self) -> float:
        """v_l: mean over layers and union tokens of the squared distance from the mean rank."""
        ranks = torch.stack(list(self._ranks)).double()  # X: [L_obs, n]
        k = min(self._settings.select_tokens - self._settings.window_size, ranks.shape[1])
        union = (ranks <= k).any(0)
        return float(ranks[:, union].var(dim=0, correction=0).mean())

    def _relative(self, variance: float) -> float:
        if self._first_variance is None:
            self._first_variance = variance
            return 1.0
        return variance / (self._first_variance or _NO_VARIANCE)
