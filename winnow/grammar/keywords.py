"""The keywords of JSON Schema under which further schemas stand."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

DEFS = ("$defs", "definitions")
MAPS = ("properties", "patternProperties", *DEFS)
LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
SINGLE = ("items", "additionalProperties")
_MAX_REFERENCES = 100


def members(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What stands directly within a schema where a schema should, and its place: `.items`."""
    for key, value in schema.items():
        if key in SINGLE:
            yield f".{key}", value
        elif key in MAPS and isinstance(value, dict):
            yield from ((f".{key}.{name}", inner) for name, inner in value.items())
        elif key in LISTS and isinstance(value, list):
            yield from ((f".{key}[{idx}]", inner) for idx, inner in enumerate(value))


def schemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401 - any JSON
    """The schema and all that stand within it, each with its place; only those that are objects."""
    stack = [("", schema)]
    while stack:
        place, one = stack.pop()
        if isinstance(one, dict):
            yield place, one
            stack.extend((place + step, inner) for step, inner in members(one))


def with_members(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The schema with each of its `members` changed."""
    return {key: _changed(key, value, change) for key, value in schema.items()}


def _changed(key: str, value: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    if key in MAPS and isinstance(value, dict):
        return {name: change(inner) for name, inner in value.items()}
    if key in LISTS and isinstance(value, list):
        return [change(inner) for inner in value]
    return change(value) if key in SINGLE else value


def referred(schema: Any, whole: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    """The schema that one refers to within the whole; the schema itself if none.

    References that lead to others are followed, up to _MAX_REFERENCES of them.
    """
    for _ in range(_MAX_REFERENCES):
        found = target(schema, whole)
        if found is None:
            break
        schema = found
    return schema


def target(schema: Any, whole: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """What the schema's own reference points to, such as `#/$defs/a`; None if nothing."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = whole
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found
