"""StreamingLLM (arXiv 2309.17453): keeps attention sinks and the most recent tokens."""

import torch
from torch import Tensor

from winnow.methods.base import Bound, LayerView, Method
from winnow.pruning_settings import PruningSettings
from winnow.scoring import with_window

_NUM_SINKS = 4


class Streaming(Method):
    """Keeps the first 4 tokens and the last `kv_budget - 4`, at their original positions.

    Fewer sinks if the window, which decode needs for its observations, would not fit beside them.
    """

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.kv_budget, "kv_budget")

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        budget = self.settings.kv_budget
        if budget is None or view.num_tokens <= budget:
            return None
        num_sinks = min(_NUM_SINKS, budget - self.settings.window_size)
        sinks = torch.arange(num_sinks, device=view.keys.device)
        return [with_window(sinks, view.num_tokens, budget - num_sinks)] * view.num_kv_heads
