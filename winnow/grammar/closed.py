"""Closing the objects of a JSON schema: they have the properties that it names, and no others."""

from typing import Any

from winnow.grammar.exclusive import exclusive
from winnow.grammar.keywords import schemas, with_members

_OPEN_ENDED = (
    *("additionalProperties", "unevaluatedProperties", "patternProperties"),
    *("minProperties", "dependentRequired"),
)
_BESIDE = ("$ref", "anyOf", "oneOf", "allOf", "if", "dependentSchemas")


def closed(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """The schema with `additionalProperties: false` wherever an object names its properties.

    Models that may add properties of their own do, without end. Instances are instances of the
    schema as it was. One that puts objects together (`allOf`, properties beside a `$ref`) is left
    as it is, and so is one with a `oneOf` of which closed members alone exclude each other.
    """
    if not isinstance(schema, dict) or any(_combines(one, schema) for _, one in schemas(schema)):
        return schema
    return _closed(schema)


def _combines(schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether an object's properties are named in more than one place, or by what it has not."""
    if "allOf" in schema or ("properties" in schema and any(name in schema for name in _BESIDE)):
        return True
    return "oneOf" in schema and not exclusive(schema["oneOf"], whole)


def _closed(schema: Any) -> Any:  # noqa: ANN401
    if not isinstance(schema, dict):
        return schema
    done = with_members(schema, _closed)
    if _may_close(schema):
        done["additionalProperties"] = False
    return done


def _may_close(schema: dict[str, Any]) -> bool:
    """Whether the object names all properties that it must have."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not properties or any(key in schema for key in _OPEN_ENDED):
        return False
    return isinstance(required, list) and all(name in properties for name in required)
