"""Whether the members of a `oneOf` exclude each other, so that each instance is of one at most."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from winnow.grammar.keywords import referred, with_members

_KINDS = {"integer": "number"}  # every integer is a number, too
_Values = frozenset[str]


def exclusive(members: Any, whole: Mapping[str, Any]) -> bool:  # noqa: ANN401 - any JSON
    """Whether that can be told by their types, or by the values of a property they must have."""
    if not isinstance(members, Sequence):
        return False
    resolved = [referred(member, whole) for member in members]
    return all(_exclude(one, other) for one, other in combinations(resolved, 2))


def discriminated(schema: Any, whole: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The schema in which members of a `oneOf` with a `discriminator` must have its property.

    Pydantic leaves that out where the property has a default, and the members do not exclude each
    other.
    """
    if not isinstance(schema, dict):
        return schema
    done = with_members(schema, lambda inner: discriminated(inner, whole))
    told, members = done.get("discriminator"), done.get("oneOf")
    name = told.get("propertyName") if isinstance(told, dict) else None
    if isinstance(name, str) and isinstance(members, list):
        done["oneOf"] = [_with_required(member, name, whole) for member in members]
    return done


def _with_required(member: Any, name: str, whole: Mapping[str, Any]) -> Any:  # noqa: ANN401
    own = referred(member, whole)
    if not isinstance(own, dict) or name in _required(own) or name not in _properties(own):
        return member
    return {**own, "required": [*_required(own), name]}


def _exclude(one: Any, other: Any) -> bool:  # noqa: ANN401
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    types, others = _types(one), _types(other)
    if types and others and types.isdisjoint(others):
        return True
    values, other_values = _values(one), _values(other)
    if values is not None and other_values is not None:
        return values.isdisjoint(other_values)
    if types != {"object"} or others != {"object"}:
        return False
    return any(_differ(one, other, name) for name in {*_required(one), *_required(other)})


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether the property, which one of them must have, cannot be the same in both."""
    values, others = (_values(_properties(schema).get(name)) for schema in (one, other))
    return values is not None and others is not None and values.isdisjoint(others)


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    told = schema.get("type")
    names = [told] if isinstance(told, str) else told if isinstance(told, list) else []
    return frozenset(_KINDS.get(str(name), str(name)) for name in names)


def _values(schema: Any) -> _Values | None:  # noqa: ANN401
    """The values that it allows, as JSON; None if they are not listed."""
    if not isinstance(schema, dict):
        return None
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list):
        return None
    return frozenset(json.dumps(value, sort_keys=True) for value in listed)


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: Mapping[str, Any]) -> Sequence[str]:
    required = schema.get("required")
    return [one for one in required if isinstance(one, str)] if isinstance(required, list) else []
