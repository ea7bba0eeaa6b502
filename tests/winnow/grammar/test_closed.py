"""Objects have the properties that a schema names, unless it says otherwise."""

from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from tests.random_schemas import random_schema
from winnow.grammar.closed import closed

NAMED: dict[str, Any] = {"properties": {"a": {}}}
TYPED = NAMED | {"type": "object"}
CLOSED = {"properties": {"a": {}}, "additionalProperties": False}


def kind(name: str) -> dict[str, Any]:
    """As pydantic writes a member of a discriminated union."""
    properties = {"kind": {"const": name, "type": "string"}, name: {"type": "integer"}}
    return {"type": "object", "properties": properties, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (NAMED, CLOSED),
        ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [NAMED, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        (
            {"$defs": {"x": NAMED}, "$ref": "#/$defs/x"},
            {"$defs": {"x": CLOSED}, "$ref": "#/$defs/x"},
        ),
        (
            {"properties": {"properties": NAMED}},
            {"properties": {"properties": CLOSED}, "additionalProperties": False},
        ),
        ({"additionalProperties": NAMED}, {"additionalProperties": CLOSED}),
        (
            {"properties": {"allOf": NAMED}},
            {"properties": {"allOf": CLOSED}, "additionalProperties": False},
        ),
        ({"oneOf": [{"type": "null"}, TYPED]}, {"oneOf": [{"type": "null"}, TYPED | CLOSED]}),
        (
            {"oneOf": [kind("cat"), kind("dog")]},
            {"oneOf": [kind(name) | {"additionalProperties": False} for name in ("cat", "dog")]},
        ),
    ],
)
def test_an_object_that_names_its_properties_has_no_others(
    schema: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert closed(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"properties": {}},
        NAMED | {"additionalProperties": True},
        NAMED | {"patternProperties": {"^x": {}}},
        NAMED | {"required": ["b"]},
        NAMED | {"minProperties": 2},
        {"allOf": [NAMED, {"properties": {"b": {}}}]},
        NAMED | {"$ref": "#/$defs/x", "$defs": {"x": NAMED}},
        NAMED | {"anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"oneOf": [NAMED, {"properties": {"b": {}}, "required": ["b"]}]},
        {"oneOf": [{"$ref": "#/$defs/x"}, NAMED], "$defs": {"x": NAMED}},
        {"enum": [NAMED]},
        {"const": NAMED},
        {"default": NAMED},
    ],
)
def test_what_may_have_others_is_left_as_it_is(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


@pytest.mark.parametrize("seed", range(20))
def test_a_closed_schema_is_a_schema(seed: int) -> None:
    jsonschema.Draft202012Validator.check_schema(closed(random_schema(seed)))
