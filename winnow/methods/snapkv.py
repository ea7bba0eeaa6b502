"""SnapKV (arXiv 2404.14469): every token is computed, every layer's KV is compressed."""

from torch import Tensor

from winnow import compression
from winnow.methods.base import Bound, LayerView, Method
from winnow.request import PruningSettings


class SnapKV(Method):
    """Keeps of each layer what the rule `compression` keeps."""

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        if compression.follows_budget(settings):
            return Bound(settings.kv_budget, "kv_budget")
        return Bound(None, "compression")

    @classmethod
    def max_entries(cls, settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
        return compression.max_entries(settings, num_tokens, num_kv_heads)

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        if compression.keeps_all(self.settings, view.num_tokens):
            return None
        return compression.kept_entries(view.window_mass, view.num_kv_heads, self.settings)
