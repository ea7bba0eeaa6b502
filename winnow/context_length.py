"""A model's context length, and the lengths up to which its rotary tables stay the same."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_MOST = 2**31 - 1  # positions are int32 in the cache


def context_length(config: Any) -> int:  # noqa: ANN401 - each family has its own class
    """Context length of a configuration, RoPE scaling included.

    `max_position_embeddings` is the length before scaling in some configurations, and the scaled
    one in others:

    yarn              the original length times the factor, whatever is stated.
    llama3, longrope  the stated length; times the factor if that is the original one.
    linear, dynamic   the stated length times the factor.

    If layers differ in their rotary tables, the stated length is the scaled one.
    Raises ValueError if none is stated.
    """
    stated = positive_int(config, "max_position_embeddings")
    rope = _rope(config)
    factor = rope.get("factor")
    if "rope_type" not in rope or factor is None:
        return stated
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"the factor of its rotary tables is {factor!r}; it must be above 0")
    original = rope.get("original_max_position_embeddings") or stated
    if rope["rope_type"] in ("llama3", "longrope") and stated != original:
        return stated
    return min(int(original * factor), _MOST)


def constant_length(config: Any) -> int:  # noqa: ANN401
    """Sequence length up to which the rotary tables do not depend on it.

    Beyond it, keys computed in prefill would not match queries computed later.
    """
    if any(rope.get("rope_type") == "dynamic" for rope in _ropes(config).values()):
        return positive_int(config, "max_position_embeddings")
    return _MOST


def short_length(config: Any) -> int | None:  # noqa: ANN401
    """Sequence length up to which longrope's short tables are due; None for tables of other types.

    Raises ValueError if it is not stated, and for longrope in the layers of one kind alone.
    """
    rope = _rope(config)
    for kind, own in _ropes(config).items():
        if kind and own.get("rope_type") == "longrope":
            raise ValueError(
                f"the rotary tables of its {kind} layers are longrope's; Winnow runs that only "
                "where all layers share their tables"
            )
    if rope.get("rope_type") != "longrope":
        return None
    return positive_int(SimpleNamespace(**rope), "original_max_position_embeddings")


def _rope(config: Any) -> Mapping[str, Any]:  # noqa: ANN401
    return getattr(config, "rope_parameters", None) or {}


def _ropes(config: Any) -> dict[str, Mapping[str, Any]]:  # noqa: ANN401
    """The parameters of the tables of each kind of layer; of all layers, if they share them, ""."""
    rope = _rope(config)
    nested = {kind: own for kind, own in rope.items() if isinstance(own, Mapping)}
    return nested or {"": rope}


def positive_int(config: Any, name: str) -> int:  # noqa: ANN401
    """A required positive integer of a configuration; raises ValueError if it is not one."""
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number above 0")
    return value
