"""Validation of outside values; each check raises InvalidSetting with the value and the limit."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from winnow.errors import InvalidSetting

MAX_COUNT = 2**31 - 1
_TYPE_NAMES: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    int | None: "a whole number or null",
    float: "a number",
    str: "a word",
}


def require_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    """Raise InvalidSetting unless low <= value <= high (low < value with `low_open`)."""
    if not (low < value if low_open else low <= value) or not value <= high:
        bracket = "(" if low_open else "["
        raise InvalidSetting(
            f"{name} is {_shown(value)}; the allowed range is "
            f"{bracket}{_shown(low)}, {_shown(high)}]",
            param=name,
        )


def _shown(number: float) -> str:
    """A whole number has all its digits."""
    return str(number) if isinstance(number, int) else f"{number:.12g}"


def require_type(name: str, value: object, declared: Any) -> None:  # noqa: ANN401 - a field's type
    """Raise InvalidSetting for another type than declared; an int is a float, a bool is neither."""
    accepted = int | float if declared is float else declared
    is_bool = isinstance(value, bool)
    if is_bool != (declared is bool) or not isinstance(value, accepted):
        raise InvalidSetting(f"{name} is {value!r}; it must be {_TYPE_NAMES[declared]}", param=name)


def require_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raise InvalidSetting for a token that the vocabulary does not have."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidSetting(
                f"{name} has token {token_id}; the vocabulary has {vocab_size}", param=name
            )


def require_first_gpu(device: str) -> None:
    """Raise InvalidSetting for another GPU than the first that the process sees.

    Triton's launches and CUDA's graphs take the process's current one, which is the first.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and index not in ("", "0"):
        raise InvalidSetting(
            f"device is {device}; it must be cuda, the first GPU that the process sees. "
            f"CUDA_VISIBLE_DEVICES={index} makes it that one",
            param="device",
        )


def require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise InvalidSetting(f"{name} is {value!r}; known are {known}", param=name)
