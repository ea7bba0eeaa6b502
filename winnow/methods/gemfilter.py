"""GemFilter (arXiv 2409.17422): an early layer selects tokens, which are then prefilled alone."""

from winnow.checks import require_range
from winnow.methods.base import Bound, Cut, LayerView, Method
from winnow.pruning_settings import PruningSettings
from winnow.selection import most_relevant


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
    def require_fits(cls, settings: PruningSettings, num_layers: int) -> None:
        require_range("fixed_layer", settings.fixed_layer, 0, num_layers - 1)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, num_layers: int) -> int | None:
        return settings.fixed_layer

    def cut(self, view: LayerView) -> Cut | None:
        if view.layer_idx != self.settings.fixed_layer:
            return None
        last_query = view.queries[:, -1]
        return Cut(most_relevant(last_query, view.keys, self.settings.select_tokens), restart=True)
