"""Two-pass ASL (arXiv 2601.07667): ASL selects tokens, which are then prefilled alone."""

from winnow.kv import ModelShape
from winnow.methods.asl import Asl
from winnow.methods.base import Cut, LayerView
from winnow.methods.gemfilter import GemFilter
from winnow.pruning_settings import PruningSettings
from winnow.selection import AdaptiveSelection


class AslTwoPass(GemFilter):
    """As GemFilter, with ASL's layer and tokens; selects at the last layer if tau is never met."""

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        super().__init__(settings, num_tokens, shape)
        latest = self.latest_cut(settings, shape)
        self._selection = AdaptiveSelection(settings, latest, shape.full_layers)

    @classmethod
    def require_fits(cls, settings: PruningSettings, shape: ModelShape) -> None:
        Asl.require_fits(settings, shape)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, shape: ModelShape) -> int | None:
        return shape.full_layers[-1] if settings.latest_layer is None else settings.latest_layer

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        return self._selection.rho

    def cut(self, view: LayerView) -> Cut | None:
        if not self._selection.needs_scores(view.layer_idx):
            return None
        kept = self._selection.observe(view.layer_idx, view.window_mass)
        return None if kept is None else Cut(kept, restart=True)
