"""Random JSON schemas whose instances are short, so that every answer to one can end."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_NAMES = ("name", "first name", "größe", 'a"b', "x-1", "_", "items", "type")
_WORDS = ("fox", "a b", 'say "so"', "日本", "", "\\n", "null", "7")


def random_schema(seed: int) -> Schema:
    """An object's schema; the same for the same seed."""
    source = random.Random(seed)
    schema = _object(source, depth=3)
    if source.random() < 0.3:
        name = source.choice(_NAMES)
        schema["properties"][name] = {"$ref": "#/$defs/part"}
        schema["$defs"] = {"part": _any(source, depth=1)}
    return schema


def _any(source: random.Random, depth: int) -> Schema:
    kinds: list[Callable[[random.Random, int], Schema]] = [*_SCALARS]
    if depth > 0:
        kinds += [_object, _array, _either]
    return source.choice(kinds)(source, depth - 1)


def _object(source: random.Random, depth: int) -> Schema:
    names = source.sample(_NAMES, source.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(source, depth) for name in names},
        "required": [name for name in names if source.random() < 0.7],
        "additionalProperties": False,
    }


def _array(source: random.Random, depth: int) -> Schema:
    least = source.randint(0, 2)
    most = least + source.randint(0, 2)
    return {"type": "array", "items": _any(source, depth), "minItems": least, "maxItems": most}


def _either(source: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(source, depth) for _ in range(source.randint(2, 3))]}


def _string(source: random.Random, _depth: int) -> Schema:
    least = source.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + source.randint(0, 5)}


def _pattern(source: random.Random, _depth: int) -> Schema:
    return {"type": "string", "pattern": source.choice(("^[a-f]{2,4}$", "^(ja|nein)$", "^\\d{3}$"))}


def _integer(source: random.Random, _depth: int) -> Schema:
    least = source.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + source.randint(0, 1000)}


def _one_of_words(source: random.Random, _depth: int) -> Schema:
    return {"enum": source.sample([*_WORDS, 1, -2.5, True, None], source.randint(1, 4))}


def _constant(source: random.Random, _depth: int) -> Schema:
    return {"const": source.choice(_WORDS)}


def _flag(source: random.Random, _depth: int) -> Schema:
    return {"type": source.choice(("boolean", "null"))}


_SCALARS = (_string, _pattern, _integer, _one_of_words, _constant, _flag)
