"""Where in a JSON schema the part is that cannot be enforced."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from winnow.grammar.keywords import DEFS, members

_MAX_TRIES = 200
_MAX_S = 1.0
Schema = Mapping[str, Any]


def locate(schema: Schema, reason_for: Callable[[Schema], str | None]) -> tuple[str, str]:
    """The place of the smallest part that fails alone, such as `.properties.age`, and why it does.

    reason_for: why a schema cannot be enforced; None if it can.  The place of all of it is "".
    """
    defs = {key: schema[key] for key in DEFS if isinstance(schema.get(key), dict)}
    place, reason, part = "", reason_for(schema) or "", schema
    end_s = time.monotonic() + _MAX_S
    inside = _parts(part, defs)
    for _ in range(_MAX_TRIES):
        candidate = next(inside, None)
        if candidate is None or time.monotonic() > end_s:
            break
        step, inner = candidate
        if (why := reason_for({**inner, **defs})) is not None:
            place = step if _is_shared(step) else place + step
            reason, part = why, inner
            inside = _parts(part, defs)
    return place, reason


def _parts(schema: Schema, defs: Schema) -> Iterator[tuple[str, Schema]]:
    """The schemas directly within one, and at last the one that it refers to."""
    for step, inner in members(schema):
        if isinstance(inner, dict):
            yield step, inner
    for key, named in defs.items():
        name = str(schema.get("$ref")).removeprefix(f"#/{key}/")
        if isinstance(named.get(name), dict):
            yield f".{key}.{name}", named[name]


def _is_shared(step: str) -> bool:
    """Whether it begins at the whole schema."""
    return any(step.startswith(f".{key}.") for key in DEFS)
