"""The interface of pruning methods: what a method sees of a layer, and what it decides."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from winnow.compression.snapkv import keep_best
from winnow.kv import LayerKV, ModelShape, pack_layer
from winnow.methods.layer_checks import require_prunable
from winnow.pruning_settings import PruningSettings
from winnow.scoring import observed_attention

if TYPE_CHECKING:
    from winnow.attention import AttentionOptions  # loads transformers


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A token selection: only the tokens `kept` ([num_kept] int64, ascending) continue.

    With `restart` they are recomputed from layer 0, at positions 0 to num_kept - 1; without it,
    they continue to the next layer.
    """

    kept: Tensor
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on tokens or entries (None: no bound), and the setting that causes it."""

    limit: int | None
    setting: str


# A number per head and token, from a view of some of a layer's heads: [num_heads, N] float32, or
# [num_kv_heads, N]. A row depends on nothing but its own head.
HeadScore = Callable[["LayerView"], Tensor]


@dataclass(frozen=True, eq=False)
class LayerView:
    """What a method sees of a computed layer of N tokens.

    keys: [num_kv_heads, N, head_dim] and queries: [num_heads, T, head_dim], both after RoPE.
    The queries are those of the last T tokens: T = N if the method `needs_all_queries`, otherwise
    min(window_size, N).  options: of the layer's attention.
    positions: [N] of the tokens, ascending; None: 0 to N - 1.

    Another process may have some of the heads. So a method reads keys and queries in a HeadScore
    only, which `per_head` has computed where they are.
    """

    layer_idx: int
    keys: Tensor
    queries: Tensor
    options: "AttentionOptions"
    window_size: int
    positions: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return int(self.keys.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.keys.shape[1])

    @property
    def window_queries(self) -> Tensor:
        """[num_heads, min(window_size, N), head_dim], of the last tokens."""
        return self.queries[:, -self.window_size :].contiguous()

    @property
    def kept_queries(self) -> Tensor:
        """`window_queries` as they go with the KV: none of a layer that decode does not score."""
        return self.window_queries if self.options.layer.is_full else self.queries[:, :0]

    def per_head(self, score: HeadScore) -> Tensor:
        """The score of every head: [num_heads, N].

        score: a module's function, or a `functools.partial` of one, which other ranks call too.
        """
        return score(self)

    @cached_property
    def window_mass(self) -> Tensor:
        """Attention that each token receives from the window: [num_heads, N] float32."""
        return self.per_head(_window_mass)

    def pack(self, values: Tensor, positions: Tensor, kept: list[Tensor] | None) -> LayerKV:
        """The kept KV of every head.

        values: like `keys`.  positions: [N].  kept: as `Method.kept_entries` returns it.
        """
        if kept is None:
            kept = [torch.arange(self.num_tokens, device=values.device)] * self.num_kv_heads
        queries = self.kept_queries
        return pack_layer(self.layer_idx, self.keys, values, positions, kept, queries)


def _window_mass(view: LayerView) -> Tensor:
    return observed_attention(
        view.window_queries, view.keys, view.options, positions=view.positions
    )


class Method:
    """The pruning of one prompt; this base class prunes nothing.

    After each full layer the engine calls `observe` for a cut, then `kept_entries` for the KV
    entries to keep. After a restart it calls neither: all KV of pass two is kept. Of layers that
    attend to a window `visible_entries` says what is kept.
    """

    prunes: ClassVar[bool] = True
    needs_all_queries: ClassVar[bool] = False
    runs_twice: ClassVar[bool] = False  # every cut is a restart, and nothing is kept before it

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        self.settings = settings
        self.shape = shape
        self.selection_layer: int | None = None  # the first layer with a cut
        self._limit = self.token_bound(settings).limit
        self._num_tokens = num_tokens

    # Bounds that depend on settings only

    @classmethod
    def token_bound(cls, settings: PruningSettings) -> Bound:
        """The most tokens that continue after the cut."""
        return Bound(None, "method")

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        """The most KV entries that a KV head keeps, on average over layers and heads."""
        return Bound(None, "method")

    @classmethod
    def max_entries(cls, settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
        """The most KV entries that one (layer, KV head) can keep of a prompt of `num_tokens`."""
        limit = cls.entry_bound(settings).limit
        return num_tokens if limit is None else min(limit, num_tokens)

    @classmethod
    def require_fits(cls, settings: PruningSettings, shape: ModelShape) -> None:
        """Raise InvalidSetting for settings that do not fit a model of this shape."""
        if cls.prunes or settings.decode_side.observes:
            require_prunable(settings, shape)

    @classmethod
    def latest_cut(cls, settings: PruningSettings, shape: ModelShape) -> int | None:
        """The layer at which a prompt that is not short is cut at the latest; None: maybe never."""
        return None

    @classmethod
    def no_prefix_reason(cls) -> str | None:
        """Why the prefix store cannot give it a prompt's beginning; None if it can."""
        return "needs_all_queries" if cls.needs_all_queries else None

    # One prompt

    @property
    def short_prompt(self) -> bool:
        """Whether the prompt is too short to cut: a cut would keep all of its tokens."""
        return self._limit is not None and self._num_tokens <= self._limit

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        """(layer, relative rank variance) for each layer where it was evaluated."""
        return ()

    @property
    def no_selection_reason(self) -> str | None:
        """Why the prompt was not cut: off, short_prompt, threshold_not_met; None if it was cut."""
        if self.selection_layer is not None:
            return None
        if self._limit is None:
            return "off"
        return "short_prompt" if self.short_prompt else "threshold_not_met"

    def layer_tokens_left(self, layer_idx: int, num_tokens: int) -> int:
        """Tokens of all layers from `layer_idx` on, where `num_tokens` go on.

        Before the cut it is an estimate: the latest cut, after which as many go on as may.
        """
        num_layers = self.shape.num_layers
        cut_layer = self.latest_cut(self.settings, self.shape)
        none_to_come = self.short_prompt or self.selection_layer is not None
        if none_to_come or cut_layer is None or self._limit is None:
            return (num_layers - layer_idx) * num_tokens
        num_below = cut_layer + 1 - layer_idx
        num_above = num_layers if self.runs_twice else num_layers - cut_layer - 1
        return num_below * num_tokens + num_above * self._limit

    def observe(self, view: LayerView) -> Cut | None:
        """The cut to apply after this layer, if any; a short prompt is never cut."""
        cut = None if self.short_prompt else self.cut(view)
        if cut is not None and self.selection_layer is None:
            self.selection_layer = view.layer_idx
        return cut

    def cut(self, view: LayerView) -> Cut | None:
        """As `observe`, for a prompt that is not short; methods override this."""
        return None

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        """Per KV head, ascending indices into the layer's tokens, [num_kept] int64; None: all."""
        return None

    def visible_entries(self, view: LayerView, num_visible: int) -> list[Tensor] | None:
        """As `kept_entries`, for a layer of which the next token sees the last `num_visible`.

        They are all kept; if the budget of entries is less, the window and the best by its
        attention.
        """
        settings, budget = self.settings, self.entry_bound(self.settings).limit
        first = view.num_tokens - num_visible
        if budget is not None and num_visible > budget:
            mass = view.window_mass[:, first:]
            best = keep_best(
                mass, view.num_kv_heads, settings.window_size, settings.kernel_size, budget
            )
            return [head + first for head in best]
        if first == 0:
            return None
        visible = torch.arange(first, view.num_tokens, device=view.keys.device)
        return [visible] * view.num_kv_heads
