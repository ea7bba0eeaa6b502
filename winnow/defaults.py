"""Default pruning settings of a model: `winnow.json`, or the paper's scaled to its depth."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from winnow.errors import InvalidSetting, UnusableModel
from winnow.folder_errors import as_unusable
from winnow.pruning_settings import PruningSettings

SETTINGS_FILE = "winnow.json"
_PAPER_LAYERS = 32  # the depth for which the paper's layer numbers were chosen


def pruning_defaults(model_path: Path, num_layers: int) -> PruningSettings:
    """Settings of `winnow.json` in the model folder, on top of those scaled to `num_layers`.

    Raises UnusableModel if the file is invalid.
    """
    scaled = scaled_defaults(num_layers)
    file = model_path / SETTINGS_FILE
    if not file.exists():
        return scaled
    with as_unusable(f"{file} is not usable"):
        try:
            settings = override(scaled, json.loads(file.read_text()))
            settings.require_fits(num_layers)
        except InvalidSetting as error:
            raise UnusableModel(f"{file}: {error}") from error
        return settings


def scaled_defaults(num_layers: int) -> PruningSettings:
    """The paper's settings; below 28 layers, layer numbers are scaled with the depth."""
    if num_layers >= 28:
        return PruningSettings()
    observed = max(1, round(8 * num_layers / _PAPER_LAYERS))
    earliest = max(observed - 1, round(10 * num_layers / _PAPER_LAYERS))
    return PruningSettings(
        observed_layers=observed,
        min_layer=min(earliest, num_layers - 1),
        fixed_layer=min(round(15 * num_layers / _PAPER_LAYERS), num_layers - 1),
    )


def override(settings: PruningSettings, changes: dict[str, Any]) -> PruningSettings:
    """`settings` with `changes`; raises InvalidSetting for an unknown name or an invalid value."""
    known = {field.name for field in fields(PruningSettings)}
    for name in changes:
        if name not in known:
            raise InvalidSetting(
                f"{name} is not a pruning setting; known are {', '.join(sorted(known))}", param=name
            )
    return replace(settings, **changes)


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
