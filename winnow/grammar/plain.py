"""A JSON schema without what says nothing about instances."""

from collections.abc import Mapping
from typing import Any

from winnow.grammar.keywords import with_members

_ANNOTATIONS = frozenset({"description", "title", "examples", "$comment"})
# Values of keywords that are the same as none. llguidance refuses some of these keywords.
_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "allOf": ([],),
    "not": (False,),
    "propertyNames": ({}, True),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "patternProperties": ({},),
    "unevaluatedItems": ({}, True),
    "unevaluatedProperties": ({}, True),
}
# Keywords that have no effect without one of others.
_ONLY_WITH: Mapping[str, frozenset[str]] = {
    "if": frozenset({"then", "else"}),
    **dict.fromkeys(("then", "else"), frozenset({"if"})),
    **dict.fromkeys(("minContains", "maxContains"), frozenset({"contains"})),
}


def plain_schema(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """The schema without descriptions and the like, and keywords whose value has no effect."""
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: value
        for key, value in schema.items()
        if not _says_nothing(key, value) and schema.keys() & _ONLY_WITH.get(key, {key})
    }
    return with_members(kept, plain_schema)


def _says_nothing(key: str, value: Any) -> bool:  # noqa: ANN401
    if key in _ANNOTATIONS:
        return True
    return any(type(value) is type(one) and value == one for one in _NO_EFFECT.get(key, ()))
