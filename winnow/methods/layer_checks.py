"""Whether a model has the layers that settings name: tokens are selected after full layers only."""

from typing import TYPE_CHECKING

from winnow.errors import InvalidSetting
from winnow.pruning_settings import PruningSettings

if TYPE_CHECKING:
    from winnow.kv import ModelShape  # loads torch
    from winnow.layers import Layer


def require_full_layer(name: str, layer_idx: int, shape: "ModelShape", lowest: int = 0) -> None:
    """Raise InvalidSetting unless the layer that the setting `name` names is a full one.

    lowest: the first layer that the setting may name.
    """
    allowed = [idx for idx in shape.full_layers if idx >= lowest]
    nearest = min(allowed, key=lambda idx: abs(idx - layer_idx))
    layer = _layer(name, layer_idx, shape, nearest)
    if not layer.is_full:
        raise InvalidSetting(
            f"{name} is {layer_idx}, a {layer} layer; tokens are selected after a full one, the "
            f"nearest is {nearest}",
            param=name,
        )


def require_observed_layers(settings: PruningSettings, shape: "ModelShape") -> None:
    """Raise InvalidSetting unless ASL sees as many full layers as it observes before it selects."""
    earliest, observed, full = settings.min_layer, settings.observed_layers, shape.full_layers
    nearest = full[-1] if earliest > 0 else full[min(observed, len(full)) - 1]
    layer = _layer("min_layer", earliest, shape, nearest)
    first = first_full_from(earliest, shape)
    if first is None:
        raise InvalidSetting(
            f"min_layer is {earliest}, a {layer} layer; tokens are selected after a full one from "
            f"there on, and the last is {full[-1]}",
            param="min_layer",
        )
    num_seen = shape.place_among_full(first)
    if num_seen < observed:
        raise InvalidSetting(
            f"observed_layers is {observed}; the first full layer from min_layer {earliest} on is "
            f"{first}, number {num_seen} of {len(full)}. observed_layers {num_seen} works"
            f"{_enough_from(settings, full)}",
            param="observed_layers",
        )


def _enough_from(settings: PruningSettings, full: tuple[int, ...]) -> str:
    """The min_layer with which as many are observed, if it alone is to be changed."""
    if settings.observed_layers > len(full):
        return ""
    enough = full[settings.observed_layers - 1]
    is_late = settings.latest_layer is not None and settings.latest_layer < enough
    return "" if is_late else f", and so does min_layer {enough}"


def first_full_from(layer_idx: int, shape: "ModelShape") -> int | None:
    """The first full layer from a layer on; None: there is none."""
    return next((idx for idx in shape.full_layers if idx >= layer_idx), None)


def _layer(name: str, layer_idx: int, shape: "ModelShape", nearest: int) -> "Layer":
    """The layer that a setting names; raises InvalidSetting if there is none.

    nearest: the full layer that it may name instead.
    """
    last = shape.num_layers - 1
    if not 0 <= layer_idx <= last:
        raise InvalidSetting(
            f"{name} is {layer_idx}; the allowed range is [0, {last}], and the nearest full layer "
            f"is {nearest}",
            param=name,
        )
    return shape.layers[layer_idx]


def require_prunable(settings: PruningSettings, shape: "ModelShape") -> None:
    """Raise InvalidSetting for settings that ask for more than a model with windows allows.

    Without full layers there is nothing to prune: each layer keeps what its window holds.
    """
    if not shape.full_layers:
        raise no_full_layer(*_asked(settings), shape)
    shortest = shape.shortest_window
    if shortest is not None and settings.window_size > shortest:
        idx, layer = next((i, one) for i, one in enumerate(shape.layers) if one.window == shortest)
        raise InvalidSetting(
            f"window_size is {settings.window_size}; layer {idx} is a {layer} layer, which attends "
            f"to {shortest} tokens at most. window_size {shortest} works",
            param="window_size",
        )


def no_full_layer(name: str, value: object, shape: "ModelShape") -> InvalidSetting:
    """The error for a setting of what is pruned, on a model that cannot be."""
    kinds = " and ".join(sorted({str(layer) for layer in shape.layers}))
    return InvalidSetting(
        f"{name} is {value}; layers 0 to {shape.num_layers - 1} are {kinds}, and a prompt is "
        "pruned by its full layers, of which there are 0. method full without decode_budget "
        "and decode_floor works",
        param=name,
    )


def _asked(settings: PruningSettings) -> tuple[str, object]:
    if settings.method != "full":
        return "method", settings.method
    if settings.decode_budget is not None:
        return "decode_budget", settings.decode_budget
    return "decode_floor", settings.decode_floor
