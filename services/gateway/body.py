"""Base class of request bodies: strict types, empty unknown fields ignored, named errors."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from winnow.errors import InvalidRequest, InvalidSetting, UnknownParameter

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_SHOWN_CHARS = 60
# What JSON calls the type that a field has, by pydantic's name for the error.
_JSON_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def asks_for_nothing(value: object) -> bool:
    """Whether a value is null or empty: clients send fields that they do not use."""
    return value is None or value in ("", [], {})


def _allow_nothing(schema: dict[str, Any]) -> None:
    """Describe in the schema which values unknown fields may have."""
    schema["additionalProperties"] = {"enum": [None, "", [], {}]}


class Body(BaseModel):
    """Base of every object in a request body: strict types, no unknown fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra=_allow_nothing
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, body: object) -> object:
        """Drop unknown fields without a value, and null where null is not allowed."""
        if not isinstance(body, Mapping):
            return body
        return {name: value for name, value in body.items() if not cls._is_nothing(name, value)}

    @classmethod
    def _is_nothing(cls, name: str, value: object) -> bool:
        fields = cls.model_fields.items()
        field = next((one for own, one in fields if name == (one.alias or own)), None)
        if field is None:
            return asks_for_nothing(value)
        is_nullable = type(None) in get_args(field.annotation) or field.annotation is Any
        return value is None and not is_nullable


BodyT = TypeVar("BodyT", bound=Body)


def validate(cls: type[BodyT], body: Mapping[str, Any]) -> BodyT:
    """The body as `cls`.

    Raises UnknownParameter, InvalidRequest for a missing parameter, or InvalidSetting for one of
    the wrong type; each names the parameter.
    """
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        # For a union type, the alternative that fits best has the error with the longest path.
        errors = error.errors(include_url=False, include_context=False)
        raise _named(body, max(errors, key=lambda one: len(one["loc"])), errors) from error


def shown(value: object) -> str:
    """A value from a body, for an error: a quoted text, or JSON."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _named(
    body: Mapping[str, Any], first: ErrorDetails, errors: Sequence[ErrorDetails]
) -> InvalidRequest:
    is_missing = first["type"] == "missing"
    param = _path(body, first["loc"], missing=is_missing)
    if first["type"] == "extra_forbidden":
        return UnknownParameter(f"unknown parameter: {param}", param=param)
    if is_missing:
        return InvalidRequest(f"missing parameter: {param}", param=param)
    same = (one["type"] for one in errors if _path(body, one["loc"], missing=False) == param)
    types = dict.fromkeys(_JSON_TYPES[one] for one in same if one in _JSON_TYPES)
    wanted = first["msg"].lower()
    if first["type"] in _JSON_TYPES:
        wanted = f"input should be {' or '.join(types)}"
    return InvalidSetting(f"{param} is {shown(first['input'])}: {wanted}", param=param)


def _path(body: object, loc: tuple[int | str, ...], *, missing: bool) -> str:
    """Pydantic's path, as `winnow.kv_budget` or `messages[1].content`, without union members."""
    path = ""
    for idx, part in enumerate(loc):
        if isinstance(part, int) and isinstance(body, list):
            path, body = f"{path}[{part}]", body[part]
        elif isinstance(body, Mapping) and part in body:
            path, body = f"{path}.{part}", body[part]
        elif missing and idx == len(loc) - 1:
            path = f"{path}.{part}"
    return path.removeprefix(".")
