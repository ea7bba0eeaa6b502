"""PyramidInfer (arXiv 2405.12532): each layer passes fewer tokens to the next."""

import math
from itertools import accumulate

import torch
from torch import Tensor

from winnow.errors import InvalidSetting
from winnow.kv import ModelShape
from winnow.methods.base import Bound, Cut, LayerView, Method
from winnow.pruning_settings import PruningSettings
from winnow.scoring import descending_order, observed_attention, with_window

# Values from the authors' code; the paper gives none.
_LAST_ROW_WEIGHT = 1.2  # of the window's last token; the first one's is 1
_MIN_CONTEXT = 64


class PyramidInfer(Method):
    """Each layer keeps the most attended of its tokens, and the window.

    The context is the tokens before the window (the paper's recent sequence). Its length decreases
    by `context_lengths`, so that a layer keeps `kv_budget` tokens on average.
    """

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        super().__init__(settings, num_tokens, shape)
        self._kept: Tensor | None = None  # of the last observed layer
        self._lengths: list[int] = []
        if settings.kv_budget is not None and not self.short_prompt:
            window = settings.window_size
            self._lengths = context_lengths(
                num_tokens - window, settings.kv_budget - window, shape.num_layers
            )

    @classmethod
    def token_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.kv_budget, "kv_budget")

    @classmethod
    def require_fits(cls, settings: PruningSettings, shape: ModelShape) -> None:
        super().require_fits(settings, shape)
        if len(shape.full_layers) < shape.num_layers:
            idx, layer = next(
                (idx, layer) for idx, layer in enumerate(shape.layers) if not layer.is_full
            )
            raise InvalidSetting(
                "method is pyramidinfer, which drops tokens after every layer, by its attention to "
                f"the whole prompt; layer {idx} is a {layer} layer. method fastkv or asl works",
                param="method",
            )

    @classmethod
    def no_prefix_reason(cls) -> str | None:
        return "drops_from_layer_0"

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        return Bound(settings.kv_budget, "kv_budget")

    @classmethod
    def max_entries(cls, settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
        return num_tokens  # the first layers may keep nearly all

    def layer_tokens_left(self, layer_idx: int, num_tokens: int) -> int:
        if not self._lengths:
            return super().layer_tokens_left(layer_idx, num_tokens)
        window = self.settings.window_size
        above = (length + window for length in self._lengths[layer_idx:-1])
        return sum([num_tokens, *above][: self.shape.num_layers - layer_idx])

    def cut(self, view: LayerView) -> Cut | None:
        self._kept = None
        if not self._lengths:
            return None
        window = self.settings.window_size
        num_context, length = view.num_tokens - window, self._lengths[view.layer_idx]
        if length == num_context:
            return None
        order = descending_order(context_scores(view)[:num_context])
        self._kept = with_window(order[:length], view.num_tokens, window)
        return Cut(self._kept)

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        return None if self._kept is None else [self._kept] * view.num_kv_heads


def context_scores(view: LayerView) -> Tensor:
    """Attention from the window, later rows weighted more, averaged over heads: [N] float32."""
    return view.per_head(_weighted_mass).mean(0)


def _weighted_mass(view: LayerView) -> Tensor:
    weights = torch.linspace(1.0, _LAST_ROW_WEIGHT, view.window_size, device=view.keys.device)
    return observed_attention(view.window_queries, view.keys, view.options, weights)


def context_lengths(num_context: int, budget: int, num_layers: int) -> list[int]:
    """The number of context tokens that each layer keeps of `num_context`; the mean is `budget`.

    Layer l, counted from 1 to L, keeps the share exp(-g (1 - cos(pi l / L)) / 2) of the context
    before it, but at least the smaller of 64 tokens and half the budget. To first order in g, this
    is the cosine schedule of the authors' code with decay ratio 1 - g. g is found by bisection.
    budget < num_context.
    """
    falls = [(1 - math.cos(math.pi * layer / num_layers)) / 2 for layer in range(1, num_layers + 1)]
    depths = list(accumulate(falls))
    shortest = min(_MIN_CONTEXT, budget // 2)

    def lengths(decay: float) -> list[float]:
        return [max(num_context * math.exp(-decay * depth), shortest) for depth in depths]

    total = budget * num_layers
    low, high = 0.0, 1.0
    while sum(lengths(high)) > total:
        low, high = high, 2 * high
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) > total else (low, middle)
    whole = [int(length) for length in lengths(high)]
    missing = total - sum(whole)  # lost to rounding; fewer than there are layers
    return [length + (idx < missing) for idx, length in enumerate(whole)]
