"""Default pruning settings: `winnow.json`, over the model family's, over the paper's scaled."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from winnow.checks import MAX_COUNT
from winnow.errors import InvalidSetting, UnusableModel
from winnow.folder_errors import as_unusable
from winnow.methods.layer_checks import first_full_from, no_full_layer
from winnow.pruning_settings import PruningSettings

if TYPE_CHECKING:
    from winnow.kv import ModelShape
    from winnow.model_files import ModelDescription

logger = logging.getLogger(__name__)

SETTINGS_FILE = "winnow.json"
# Settings measured for a family: its name, what its configuration has, settings, and their source.
_FAMILIES_FILE = Path(__file__).parent / "families.json"
_OF_FULL_LAYERS = (
    *("kv_budget", "select_tokens"),
    *("fixed_layer", "latest_layer", "min_layer", "observed_layers"),
)
_PAPER_LAYERS = 32  # the depth for which the paper's layer numbers were chosen


def pruning_defaults(description: "ModelDescription") -> PruningSettings:
    """Settings of `winnow.json` in the model folder, over the family's, over scaled ones.

    One line of the log says if nobody has measured any.
    Raises UnusableModel if the file is invalid.
    """
    shape, own = description.shape, _family_settings(description)
    usual = override(scaled_defaults(shape), own, shape)
    file = description.folder / SETTINGS_FILE
    if not file.exists():
        if not own and shape.full_layers:
            logger.info(
                "no pruning settings were measured for this model; it gets the paper's, with "
                "kernel_size %d, which lost answers on small models: `winnow calibrate` finds its "
                "own (docs/study.md)",
                usual.kernel_size,
            )
        return usual
    with as_unusable(f"{file} is not usable"):
        try:
            settings = override(usual, json.loads(file.read_text()), shape)
            settings.require_fits(shape)
        except InvalidSetting as error:
            raise UnusableModel(f"{file}: {error}") from error
        return settings


def _family_settings(description: "ModelDescription") -> dict[str, Any]:
    """Those of the family that a model is of; none for one that is not known."""
    config = {
        "model_type": description.model_type,
        "hidden_size": description.shape.hidden_size,
        "num_hidden_layers": description.shape.num_layers,
        "num_attention_heads": description.shape.num_heads,
        "num_key_value_heads": description.shape.num_kv_heads,
        "vocab_size": description.vocab_size,
    }
    for family in json.loads(_FAMILIES_FILE.read_text()):
        if family["config"].items() <= config.items():
            settings: dict[str, Any] = family["settings"]
            return settings
    return {}


def scaled_defaults(shape: "ModelShape") -> PruningSettings:
    """The paper's settings; below 28 layers, layer numbers are scaled with the depth.

    Unlike the paper's, they select at five eighths of the depth at the latest: where the variance
    never falls below the threshold, a prompt would be computed whole (docs/study.md).
    Where some layers are not full, the full ones next to these numbers are taken, and the window is
    no longer than theirs; without full layers nothing is pruned.
    """
    num_layers = shape.num_layers
    latest = round(20 * num_layers / _PAPER_LAYERS)
    if len(shape.full_layers) < num_layers:
        return _defaults_between_others(shape, latest)
    if num_layers >= 28:
        return PruningSettings(latest_layer=latest)
    observed = max(1, round(8 * num_layers / _PAPER_LAYERS))
    earliest = max(observed - 1, round(10 * num_layers / _PAPER_LAYERS))
    min_layer = min(earliest, num_layers - 1)
    return PruningSettings(
        observed_layers=observed,
        min_layer=min_layer,
        latest_layer=max(min_layer, min(latest, num_layers - 1)),
        fixed_layer=min(round(15 * num_layers / _PAPER_LAYERS), num_layers - 1),
    )


def _defaults_between_others(shape: "ModelShape", latest: int) -> PruningSettings:
    """Of a model some of whose layers are not full."""
    full = shape.full_layers
    window = min(PruningSettings().window_size, shape.shortest_window or MAX_COUNT)
    if not full:
        return PruningSettings(method="full", window_size=window)
    # The variance over a single layer is 0.
    observed = min(len(full), max(2, round(8 * len(full) / _PAPER_LAYERS)))
    earliest = shape.nearest_full(round(10 * shape.num_layers / _PAPER_LAYERS))
    min_layer = max(earliest, full[observed - 1])
    return PruningSettings(
        window_size=window,
        observed_layers=observed,
        min_layer=min_layer,
        latest_layer=max(min_layer, shape.nearest_full(latest)),
        fixed_layer=shape.nearest_full(round(15 * shape.num_layers / _PAPER_LAYERS)),
    )


def override(
    settings: PruningSettings, changes: dict[str, Any], shape: "ModelShape | None" = None
) -> PruningSettings:
    """`settings` with `changes`; raises InvalidSetting for an unknown name or an invalid value.

    A latest_layer that is not among the changes goes up with min_layer.
    shape: of the model; None: all of its layers are full.
    """
    known = {field.name for field in fields(PruningSettings)}
    for name in changes:
        if name not in known:
            raise InvalidSetting(
                f"{name} is not a pruning setting; known are {', '.join(sorted(known))}", param=name
            )
    earliest, latest = changes.get("min_layer"), settings.latest_layer
    if latest is not None and isinstance(earliest, int) and earliest > latest:
        first = earliest if shape is None else first_full_from(earliest, shape)
        changes = {"latest_layer": earliest if first is None else first} | changes
    return replace(settings, **changes)


def override_for(
    settings: PruningSettings, changes: Mapping[str, Any], shape: "ModelShape"
) -> PruningSettings:
    """`override`, of a model of this shape; raises InvalidSetting for what it cannot honour.

    On a model without full layers that is a budget or a layer too: with method full, its default,
    they would say nothing. Who names that method knows.
    """
    changed = override(settings, dict(changes), shape)
    changed.require_fits(shape)
    if not shape.full_layers and "method" not in changes:
        for name in _OF_FULL_LAYERS:
            if changes.get(name) is not None:
                raise no_full_layer(name, changes[name], shape)
    return changed


def parse_change(text: str, kind: str = "a pruning setting") -> tuple[str, Any]:
    """Parse `threshold=0.4` into a name and a value for `override`; values are YAML.

    kind: what NAME is, for the error.  Raises InvalidSetting unless the text is NAME=VALUE.
    """
    name, equals, written = text.partition("=")
    if not equals:
        raise InvalidSetting(f"{text}: {kind} must be NAME=VALUE")
    try:
        value = yaml.safe_load(written)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        value = ...
    if not isinstance(value, str | int | float | None):
        raise InvalidSetting(f"{written!r} is not a value for {name}")
    return name.replace("-", "_"), value
