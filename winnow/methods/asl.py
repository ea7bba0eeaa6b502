"""ASL (arXiv 2601.07667): selects tokens at a layer chosen per prompt; KV is compressed."""

from torch import Tensor

from winnow.checks import require_range
from winnow.kv import ModelShape
from winnow.methods.base import LayerView
from winnow.methods.fastkv import FastKV
from winnow.pruning_settings import PruningSettings
from winnow.selection import AdaptiveSelection


class Asl(FastKV):
    """As FastKV, but selects at the layer where the token ranks have settled."""

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        super().__init__(settings, num_tokens, shape)
        self._selection = AdaptiveSelection(settings, settings.latest_layer)

    @classmethod
    def require_fits(cls, settings: PruningSettings, num_layers: int) -> None:
        require_range("min_layer", settings.min_layer, 0, num_layers - 1)
        if settings.latest_layer is not None:
            require_range("latest_layer", settings.latest_layer, 0, num_layers - 1)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, num_layers: int) -> int | None:
        return settings.latest_layer

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        return self._selection.rho

    def choose(self, view: LayerView) -> Tensor | None:
        if not self._selection.needs_scores(view.layer_idx):
            return None
        return self._selection.observe(view.layer_idx, view.window_mass)
