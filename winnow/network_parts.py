"""The parts of transformers' networks, whatever their families call them."""

from collections.abc import Iterable
from typing import Any

_LAYERS = ("layers", "h", "blocks")
_FINAL_NORMS = (
    "norm",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "embedding_norm",
    "norm_f",
    "ln_f",
)
_ROTARY = ("rotary_emb", "pos_emb")
_ADDED_POSITIONS = (
    *("wpe", "embed_positions", "positions_embed"),
    *("position_embeddings", "pos_encoding"),
)
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "moe", "ffn")


def body_of(network: Any) -> Any:  # noqa: ANN401 - each family has its own class
    """What a network has below its head."""
    return _first(network, (network.base_model_prefix, "model"))


def layers_of_body(body: Any) -> Any:  # noqa: ANN401
    return _first(body, _LAYERS)


def final_norm(body: Any) -> Any:  # noqa: ANN401
    return _first(body, _FINAL_NORMS)


def rotary_of(body: Any) -> Any:  # noqa: ANN401
    """What makes rotary tables for all layers; None if they make them themselves."""
    return _first(body, _ROTARY)


def has_added_positions(body: Any) -> bool:  # noqa: ANN401
    """Whether something makes positions that are added to the embeddings."""
    names = {name.rpartition(".")[2] for name, _ in body.named_modules()}
    return any(hasattr(body, name) or name in names for name in _ADDED_POSITIONS)


def mlp_names(layer: Any) -> list[str]:  # noqa: ANN401
    """The attributes of a layer that compute each token alone."""
    return [name for name in _MLPS if getattr(layer, name, None) is not None]


def _first(parent: Any, names: Iterable[str]) -> Any:  # noqa: ANN401
    """The first of the attributes that there is; None without any."""
    return next((getattr(parent, name) for name in names if hasattr(parent, name)), None)
