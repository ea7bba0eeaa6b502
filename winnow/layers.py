"""What each layer of a model keeps of the tokens it has seen; every part of Winnow goes by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from winnow.folder_errors import cannot_run

AttentionKind = Literal["full", "sliding", "chunked"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    attention: which earlier tokens a token attends to. full: all. sliding: those of the `window`
    positions that end with its own. chunked: those of its own chunk of `window` positions. None:
    none, and the layer has no keys and values.
    is_recurrent: whether it has a state that each token changes.
    """

    attention: AttentionKind | None = "full"
    window: int | None = None
    is_recurrent: bool = False

    @property
    def is_full(self) -> bool:
        """Whether it attends to the whole prompt, so that its scores can tell what matters."""
        return self.attention == "full"

    @property
    def has_kv(self) -> bool:
        return self.attention is not None

    def first_visible(self, position: int) -> int:
        """The first position that the token at `position` attends to.  Only for attention."""
        match self.attention:
            case "sliding":
                assert self.window is not None
                return max(0, position + 1 - self.window)
            case "chunked":
                assert self.window is not None
                return position - position % self.window
        return 0

    def num_kept(self, num_tokens: int) -> int:
        """How many of so many tokens the next one sees; the last of them is always kept."""
        if self.attention is None:
            return 0
        return max(1, num_tokens - self.first_visible(num_tokens))

    def __str__(self) -> str:
        if self.attention is None:
            return "recurrent" if self.is_recurrent else "feed-forward"
        return self.attention


FULL = Layer()

# transformers' names in `layer_types`. `hybrid` has both attention and a state.
_RECURRENT = frozenset({"linear_attention", "conv", "mamba", "mamba2", "recurrent"})
_WITHOUT_MEMORY = frozenset({"moe", "mlp"})
_MOST_LAYERS = 10_000
_WINDOWED: dict[str, tuple[AttentionKind, str]] = {
    "sliding_attention": ("sliding", "sliding_window"),
    "chunked_attention": ("chunked", "attention_chunk_size"),
}


def layers_of(config: Any, num_layers: int, max_positions: int) -> tuple[Layer, ...]:  # noqa: ANN401
    """The layers of a configuration of transformers'.

    A window that is as long as the longest sequence makes a layer full.
    Raises UnusableModel for a kind of layer that Winnow does not know, ValueError for a window that
    is not stated, or more layers than any model has.
    """
    if num_layers > _MOST_LAYERS:
        raise ValueError(f"it has {num_layers:,} layers; the limit is {_MOST_LAYERS:,}")
    names = getattr(config, "layer_types", None) or _default_names(config, num_layers)
    if len(names) != num_layers:
        raise ValueError(f"it has {len(names)} layer_types for {num_layers} layers")
    return tuple(_layer(config, idx, name, max_positions) for idx, name in enumerate(names))


def _default_names(config: Any, num_layers: int) -> Sequence[str]:  # noqa: ANN401
    """Without `layer_types` a window is every layer's."""
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [kind] * num_layers


def _layer(config: Any, idx: int, name: str, max_positions: int) -> Layer:  # noqa: ANN401
    if name in ("full_attention", "attention"):
        return FULL
    if name in _WINDOWED:
        kind, setting = _WINDOWED[name]
        window = getattr(config, setting, None)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"layer {idx} is a {name} layer, but its {setting} is {window!r}")
        return FULL if window >= max_positions else Layer(kind, window)
    if name == "hybrid":
        return Layer("full", is_recurrent=True)
    if name in _RECURRENT:
        return Layer(None, is_recurrent=True)
    if name in _WITHOUT_MEMORY:
        return Layer(None)
    raise cannot_run(
        config.model_type,
        f"layer {idx} is a {name} layer, which is a kind that Winnow does not know",
    )
