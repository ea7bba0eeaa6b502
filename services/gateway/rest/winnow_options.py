"""The `winnow` object of a request body: the fields of PruningSettings, and a few more."""

from dataclasses import Field as Setting
from dataclasses import fields
from typing import Any

from pydantic import Field, create_model

from services.gateway.body import Body, Integer
from winnow.catalog import COMPRESSIONS, METHODS, RECOMPRESSIONS
from winnow.pruning_settings import PruningSettings

_TYPES: dict[Any, Any] = {int: Integer, int | None: Integer | None}
_NAMES = {"method": METHODS, "compression": COMPRESSIONS, "recompression": RECOMPRESSIONS}


def _field(setting: Setting[Any]) -> tuple[Any, Any]:
    names = _NAMES.get(setting.name)
    told: Any = {"enum": list(names)} if names else None
    default: Any = setting.default
    return _TYPES.get(setting.type, setting.type), Field(default, json_schema_extra=told)


_FIELDS: dict[str, Any] = {setting.name: _field(setting) for setting in fields(PruningSettings)}


class WinnowOptions(create_model("_Settings", __base__=Body, **_FIELDS)):  # type: ignore[misc]
    """How the request's prompts are pruned; an absent field keeps the service's setting.

    null means none, where that is possible. verify: generate the unpruned answer too, and compare.
    task: the name under which metrics of quality count the request. explain: tell in the usage what
    was dropped of the prompt, and by which scores.
    """

    verify: bool | None = None
    task: str | None = None
    explain: bool | None = None

    def changes(self) -> dict[str, Any]:
        """The pruning settings that the request set."""
        return dict(self.model_dump(exclude_unset=True, include=set(_FIELDS)))


def options_schema(schema: dict[str, Any], service: PruningSettings) -> dict[str, Any]:
    """The schema of WinnowOptions with the service's settings as defaults."""
    properties = {
        name: {**told, "default": getattr(service, name)} if name in _FIELDS else told
        for name, told in schema["properties"].items()
    }
    return {**schema, "properties": properties}
