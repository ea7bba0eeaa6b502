"""Whether a model has the layers that settings name: tokens are selected after full layers only."""

from typing import TYPE_CHECKING

from winnow.checks import require_range
from winnow.errors import InvalidSetting
from winnow.pruning_settings import PruningSettings

if TYPE_CHECKING:
    from winnow.kv import ModelShape  # loads torch


def require_full_layer(name: str, layer_idx: int, shape: "ModelShape", lowest: int = 0) -> None:
    """Raise InvalidSetting unless the layer that the setting `name` names is a full one.

    lowest: the first layer that the setting may name.
    """
    require_range(name, layer_idx, 0, shape.num_layers - 1)
    layer = shape.layers[layer_idx]
    if not layer.is_full:
        allowed = [idx for idx in shape.full_layers if idx >= lowest]
        nearest = min(allowed, key=lambda idx: abs(idx - layer_idx))
        raise InvalidSetting(
            f"{name} is {layer_idx}, a {layer} layer; tokens are selected after a full one, the "
            f"nearest is {nearest}",
            param=name,
        )


def require_observed_layers(settings: PruningSettings, shape: "ModelShape") -> None:
    """Raise InvalidSetting unless ASL sees as many full layers as it observes before it selects."""
    require_range("min_layer", settings.min_layer, 0, shape.num_layers - 1)
    full = shape.full_layers
    candidates = [idx for idx in full if idx >= settings.min_layer]
    if not candidates:
        raise InvalidSetting(
            f"min_layer is {settings.min_layer}; the last full layer, after which tokens can be "
            f"selected, is {full[-1]}",
            param="min_layer",
        )
    num_seen = full.index(candidates[0]) + 1
    if num_seen < settings.observed_layers:
        raise InvalidSetting(
            f"observed_layers is {settings.observed_layers}; up to layer {candidates[0]}, the "
            f"first full one from min_layer {settings.min_layer} on, {num_seen} layers are full"
            + _enough_from(settings.observed_layers, full),
            param="observed_layers",
        )


def _enough_from(observed_layers: int, full: tuple[int, ...]) -> str:
    if observed_layers > len(full):
        return f", and {len(full)} in all"
    return f". min_layer {full[observed_layers - 1]} works"


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
