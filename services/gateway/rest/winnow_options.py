"""The `winnow` object of a request body, generated from the fields of PruningSettings."""

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

    null means none, where that is possible.
    """

    def changes(self) -> dict[str, Any]:
        """The fields that the request set."""
        return dict(self.model_dump(exclude_unset=True))


def options_schema(schema: dict[str, Any], service: PruningSettings) -> dict[str, Any]:
    """The schema of WinnowOptions with the service's settings as defaults."""
    properties = {
        name: {**told, "default": getattr(service, name)}
        for name, told in schema["properties"].items()
    }
    return {**schema, "properties": properties}
