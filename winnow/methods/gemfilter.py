"""GemFilter (arXiv 2409.17422): an early layer selects tokens, which are then prefilled alone."""

from torch import Tensor

from winnow.kv import ModelShape
from winnow.methods.base import Bound, Cut, LayerView, Method
from winnow.methods.layer_checks import require_full_layer
from winnow.pruning_settings import PruningSettings
from winnow.selection import most_relevant, relevance


class GemFilter(Method):
    """Selects `select_tokens` tokens at layer `fixed_layer`; keeps all KV of pass two."""

    runs_twice = True

    @classmethod
    def token_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.select_tokens, "select_tokens")

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.select_tokens, "select_tokens")

    @classmethod
    def require_fits(cls, settings: PruningSettings, shape: ModelShape) -> None:
        super().require_fits(settings, shape)
        require_full_layer("fixed_layer", settings.fixed_layer, shape)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, shape: ModelShape) -> int | None:
        return settings.fixed_layer

    def cut(self, view: LayerView) -> Cut | None:
        if view.layer_idx != self.settings.fixed_layer:
            return None
        raw = view.per_head(_relevance)
        return Cut(most_relevant(raw, self.settings.select_tokens), restart=True)


def _relevance(view: LayerView) -> Tensor:
    return relevance(view.queries[:, -1], view.keys)
