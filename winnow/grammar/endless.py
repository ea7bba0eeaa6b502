"""Parts of a JSON schema that no finite text matches, since they always hold themselves again."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from winnow.errors import InvalidGrammar
from winnow.grammar.keywords import members, schemas, target


def require_finite(schema: Mapping[str, Any]) -> None:
    """Raise InvalidGrammar, with its place, for a part that only an endless text would match."""
    parts = [*schemas(schema)]
    finite = _finite(schema, [part for _, part in parts])
    for place, part in parts:
        if id(part) not in finite:
            raise InvalidGrammar(
                "cannot be enforced: no text matches it, which always holds itself again",
                param=place,
            )


def _finite(whole: Mapping[str, Any], parts: list[dict[str, Any]]) -> set[int]:
    """The ids of those parts that texts with an end match."""
    endless = {id(part) for part in parts}
    users = defaultdict(list)  # of a part, by its id
    for part in parts:
        for inner in (target(part, whole), *(one for _, one in members(part))):
            users[id(inner)].append(part)
    finite: set[int] = set()
    ready = parts[:]  # what stands within another comes after it, and is taken first
    while ready:
        part = ready.pop()
        if id(part) in endless and _ends(part, whole, endless):
            endless.remove(id(part))
            finite.add(id(part))
            ready.extend(users[id(part)])
    return finite


def _ends(part: dict[str, Any], whole: Mapping[str, Any], endless: set[int]) -> bool:
    """Whether some text of the part ends, as far as is known."""
    if "enum" in part or "const" in part:
        return True
    if id(target(part, whole)) in endless:
        return False
    for key, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        ones = part.get(key)
        if isinstance(ones, list) and ones and not enough(id(one) not in endless for one in ones):
            return False
    needed = {"object": _properties, "array": _items}.get(str(part.get("type")))
    return needed is None or not any(id(one) in endless for one in needed(part))


def _properties(part: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of what an object must have."""
    named, required = part.get("properties"), part.get("required")
    if isinstance(named, dict) and isinstance(required, list):
        yield from (named[name] for name in required if isinstance(name, str) and name in named)


def _items(part: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of what an array must have."""
    first, least = part.get("prefixItems"), part.get("minItems")
    first = first if isinstance(first, list) else []
    if isinstance(least, int):
        yield from first[:least]
        if least > len(first):
            yield part.get("items")
