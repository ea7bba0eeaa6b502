from collections.abc import Mapping
from typing import Any

from winnow.grammar.place import locate


def fails_with_bad(part: Mapping[str, Any]) -> str | None:
    return "bad" if "bad" in repr({**part, "$defs": 0}) or is_bad_reference(part) else None


def is_bad_reference(part: Mapping[str, Any]) -> bool:
    name = part.get("$ref", "").removeprefix("#/$defs/")
    return bool(name) and "bad" in repr(part.get("$defs", {}).get(name))


def test_the_smallest_part_that_fails_alone_is_found() -> None:
    schema = {"properties": {"good": {}, "a.b": {"anyOf": [{}, {"items": {"bad": 1}}]}}}
    assert locate(schema, fails_with_bad) == (".properties.a.b.anyOf[1].items", "bad")


def test_a_part_that_fails_only_with_others_is_no_place() -> None:
    schema = {"properties": {"a": {"x": 1}, "b": {"y": 1}}}
    both = ("x", "y")
    place = locate(
        schema, lambda part: "both" if all(f"'{k}'" in repr(part) for k in both) else None
    )
    assert place == ("", "both")


def test_a_reference_is_followed_to_its_definition() -> None:
    schema = {
        "items": {"$ref": "#/$defs/node"},
        "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/leaf"}, "x": {"bad": 1}}}},
    }
    assert locate(schema, fails_with_bad) == (".$defs.node.properties.x", "bad")


def test_references_in_a_circle_come_to_an_end() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    calls = []

    def always(part: Mapping[str, Any]) -> str:
        calls.append(part)
        return "bad"

    assert locate(schema, always)[1] == "bad"
    assert len(calls) <= 201


def test_what_is_no_schema_is_not_looked_into() -> None:
    schema = {"properties": [{"bad": 1}], "anyOf": {"bad": 1}, "items": True, "$defs": 3}
    assert locate(schema, fails_with_bad) == ("", "bad")
