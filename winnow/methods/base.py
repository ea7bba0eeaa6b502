"""What a pruning method sees, and what it answers."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from winnow.kv import ModelShape
from winnow.pruning_settings import PruningSettings
from winnow.scoring import observed_attention


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The decision to go on with some of a layer's tokens: `kept` [num_kept] int64, ascending.

    With `restart` the kept token ids are computed again from layer 0, at positions 0 to
    num_kept - 1; without, they go on to the next layer.
    """

    kept: Tensor
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """At most `limit` tokens or entries (None: as many as there are), because of `setting`."""

    limit: int | None
    setting: str


@dataclass(frozen=True, eq=False)
class LayerView:
    """A layer that was computed, N tokens.

    keys: [num_kv_heads, N, head_dim] and queries: [num_heads, T, head_dim], both after RoPE.
    The queries are those of the last T tokens: T = N if the method `needs_all_queries`, otherwise
    min(window_size, N).  scaling: what q·k is multiplied by before softmax.
    """

    layer_idx: int
    keys: Tensor
    queries: Tensor
    scaling: float
    window_size: int

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

    @cached_property
    def window_mass(self) -> Tensor:
        """Attention that each token receives from the window: [num_heads, N] float32."""
        return observed_attention(self.window_queries, self.keys, self.scaling)


class Method:
    """One prompt's pruning; as it stands, none.

    After each layer the engine asks `observe` for a cut and then `kept_entries` for what the layer
    leaves to decoding. After a restart it asks neither: all of pass two is kept.
    """

    needs_all_queries: ClassVar[bool] = False
    runs_twice: ClassVar[bool] = False  # every cut is a restart, and nothing is kept before it

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        self.settings = settings
        self.shape = shape
        self.selection_layer: int | None = None  # the first that cut
        self._limit = self.token_bound(settings).limit
        self._num_tokens = num_tokens

    # Known before there is a prompt

    @classmethod
    def token_bound(cls, settings: PruningSettings) -> Bound:
        """How many tokens go on at most once the prompt has been cut."""
        return Bound(None, "method")

    @classmethod
    def entry_bound(cls, settings: PruningSettings) -> Bound:
        """How many KV entries a KV head keeps at most, on average over layers and heads."""
        return Bound(None, "method")

    @classmethod
    def max_entries(cls, settings: PruningSettings, num_tokens: int, num_kv_heads: int) -> int:
        """KV entries that one (layer, KV head) can keep at most of a prompt of `num_tokens`."""
        limit = cls.entry_bound(settings).limit
        return num_tokens if limit is None else min(limit, num_tokens)

    @classmethod
    def require_fits(cls, settings: PruningSettings, num_layers: int) -> None:
        """Raise InvalidSetting for settings that cannot work with a model of `num_layers`."""

    # One prompt

    @property
    def short_prompt(self) -> bool:
        """Whether the prompt has no more tokens than a cut would keep, so that none is made."""
        return self._limit is not None and self._num_tokens <= self._limit

    @property
    def rho(self) -> tuple[tuple[int, float], ...]:
        """(layer, relative rank variance) for each layer at which it was looked at."""
        return ()

    @property
    def no_selection_reason(self) -> str | None:
        """Why the prompt was not cut: off, short_prompt, threshold_not_met; None if it was."""
        if self.selection_layer is not None:
            return None
        if self._limit is None:
            return "off"
        return "short_prompt" if self.short_prompt else "threshold_not_met"

    def observe(self, view: LayerView) -> Cut | None:
        """The cut to make after this layer, if any; a short prompt is never cut."""
        cut = None if self.short_prompt else self.cut(view)
        if cut is not None and self.selection_layer is None:
            self.selection_layer = view.layer_idx
        return cut

    def cut(self, view: LayerView) -> Cut | None:
        """This method's choice for a prompt that is not short."""
        return None

    def kept_entries(self, view: LayerView) -> list[Tensor] | None:
        """Per KV head, ascending indices into the layer's tokens; None: all are kept."""
        return None
