"""FastKV (arXiv 2502.01068): selects tokens once, at a fixed layer; KV is compressed."""

from torch import Tensor

from winnow.kv import ModelShape
from winnow.methods.base import Bound, Cut, LayerView
from winnow.methods.layer_checks import require_full_layer
from winnow.methods.snapkv import SnapKV
from winnow.pruning_settings import PruningSettings
from winnow.scoring import descending_order
from winnow.selection import best_tokens, token_scores


class FastKV(SnapKV):
    """Above layer `fixed_layer`, computes only its best-scored tokens and the window."""

    @classmethod
    def token_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.select_tokens, "select_tokens")

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        if settings.full_kv_below:
            return Bound(None, "full_kv_below")
        return super().entry_bound(settings)

    @classmethod
    def max_entries(cls, settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
        if settings.full_kv_below:
            return num_tokens
        return super().max_entries(settings, num_tokens, num_kv_heads)

    @classmethod
    def require_fits(cls, settings: PruningSettings, shape: ModelShape) -> None:
        super().require_fits(settings, shape)
        require_full_layer("fixed_layer", settings.fixed_layer, shape)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, shape: ModelShape) -> int | None:
        return settings.fixed_layer

    def cut(self, view: LayerView) -> Cut | None:
        chosen = None if self.selection_layer is not None else self.choose(view)
        return None if chosen is None else Cut(chosen)

    def choose(self, view: LayerView) -> Tensor | None:
        """The tokens to keep if this is the selection layer; not called after it.

        Returns [num_kept] int64, ascending, or None.
        """
        if view.layer_idx != self.settings.fixed_layer:
            return None
        scores = token_scores(view.window_mass, self.settings)
        return best_tokens(descending_order(scores), self.settings)

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        below = self.selection_layer is None or view.layer_idx <= self.selection_layer
        return None if self.settings.full_kv_below and below else super().kept_entries(view)
