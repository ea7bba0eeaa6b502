"""ASL (arXiv 2601.07667): selects tokens at a layer chosen per prompt; KV is compressed."""

from torch import Tensor

from winnow.kv import ModelShape
from winnow.methods.base import LayerView
from winnow.methods.fastkv import FastKV
from winnow.methods.layer_checks import (
    require_full_layer,
    require_observed_layers,
    require_prunable,
)
from winnow.pruning_settings import PruningSettings
from winnow.selection import AdaptiveSelection


class Asl(FastKV):
    """As FastKV, but selects at the layer where the token ranks have settled."""

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        super().__init__(settings, num_tokens, shape)
        self._selection = AdaptiveSelection(settings, settings.latest_layer, shape.full_layers)

    @classmethod
    def require_fits(cls, settings: PruningSettings, shape: ModelShape) -> None:
        require_prunable(settings, shape)
        require_observed_layers(settings, shape)
        if settings.latest_layer is not None:
            require_full_layer("latest_layer", settings.latest_layer, shape, settings.min_layer)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, shape: ModelShape) -> int | None:
        return settings.latest_layer

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        return self._selection.rho

    def choose(self, view: LayerView) -> Tensor | None:
        if not self._selection.needs_scores(view.layer_idx):
            return None
        return self._selection.observe(view.layer_idx, view.window_mass)
