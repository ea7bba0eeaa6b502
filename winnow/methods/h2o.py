"""H2O (arXiv 2306.14048): keeps heavy hitters (most attended by all tokens) and recent tokens."""

from torch import Tensor

from winnow.methods.base import Bound, LayerView, Method
from winnow.pruning_settings import PruningSettings
from winnow.scoring import accumulated_attention, descending_order, sum_head_groups, with_window


class H2O(Method):
    """Keeps per KV head `kv_budget` entries, half heavy hitters and half the most recent tokens.

    The recent part is at least the window, which decode uses as its observation window.
    """

    needs_all_queries = True

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.kv_budget, "kv_budget")

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        budget = self.settings.kv_budget
        if budget is None or view.num_tokens <= budget:
            return None
        mass = view.per_head(_accumulated_mass)
        num_recent = max(budget // 2, self.settings.window_size)
        return keep_heavy_hitters(mass, view.num_kv_heads, num_recent, budget)


def _accumulated_mass(view: LayerView) -> Tensor:
    return accumulated_attention(view.queries, view.keys, view.options)


def keep_heavy_hitters(
    mass: Tensor, num_kv_heads: int, num_recent: int, kv_budget: int
) -> list[Tensor]:
    """Per KV head, the last `num_recent` entries and the heaviest others, ascending.

    mass: [num_heads, num_tokens] accumulated attention, num_tokens > kv_budget > num_recent.
    Returns num_kv_heads tensors [kv_budget] int64.
    """
    num_tokens = mass.shape[1]
    scores = sum_head_groups(mass[:, : num_tokens - num_recent], num_kv_heads)
    heaviest = descending_order(scores)[:, : kv_budget - num_recent]
    return [with_window(head, num_tokens, num_recent) for head in heaviest]
