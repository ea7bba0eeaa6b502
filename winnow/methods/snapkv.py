"""SnapKV (arXiv 2404.14469): computes every token and compresses every layer's KV."""

from torch import Tensor

from winnow.compression import compression_rule
from winnow.kv import ModelShape
from winnow.methods.base import Bound, LayerView, Method
from winnow.pruning_settings import PruningSettings


class SnapKV(Method):
    """Keeps the entries of each layer that the rule `compression` selects."""

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        super().__init__(settings, num_tokens, shape)
        self._rule = compression_rule(settings)

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        if compression_rule(settings).follows_budget:
            return Bound(settings.kv_budget, "kv_budget")
        return Bound(None, "compression")

    @classmethod
    def max_entries(cls, settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
        return compression_rule(settings).max_entries(num_tokens, num_kv_heads)

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        if self._rule.keeps_all(view.num_tokens):
            return None
        return self._rule.keep(view.window_mass, view.num_kv_heads)
