"""GemFilter (arXiv 2409.17422): an early layer picks tokens, which are prefilled on their own."""

from winnow.checks import require_range
from winnow.methods.base import Bound, Cut, LayerView, Method
from winnow.pruning_settings import PruningSettings
from winnow.selection import most_relevant


class GemFilter(Method):
    """At layer `fixed_layer`, the `select_tokens` best; all of pass two's KV is kept."""

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

    def cut(self, view: LayerView) -> Cut | None:
        if view.layer_idx != self.settings.fixed_layer:
            return None
        last_query = view.queries[:, -1]
        return Cut(most_relevant(last_query, view.keys, self.settings.select_tokens), restart=True)
