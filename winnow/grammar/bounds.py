"""Bounds of what llguidance compiles in minutes and gigabytes, or counts wrongly."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from winnow.errors import InvalidGrammar
from winnow.grammar.keywords import referred, schemas

# llguidance tells multiples by an automaton with a state for each remainder: 100,000 take a second,
# a million minutes. Factors of 2 and 5 cost less.
MAX_DIVISOR = 10_000
MAX_EVEN_DIVISOR = 1_000_000


def require_bounded(schema: Mapping[str, Any]) -> None:
    """Raise InvalidGrammar, with its place, for what takes too long to compile or is miscounted.

    Divisors that hold at once, in `allOf` or beside a `$ref`, make a larger one, and so do those of
    alternatives.
    """
    divisors = _Divisors(schema)
    for place, part in schemas(schema):
        try:
            _require_divisor(divisors.of(part))
            _require_countable(part)
        except InvalidGrammar as error:
            raise InvalidGrammar(error.message, param=place) from error


def _require_divisor(divisor: int) -> None:
    odd = divisor
    for factor in (2, 5):
        while odd % factor == 0:
            odd //= factor
    if odd > MAX_DIVISOR or divisor > MAX_EVEN_DIVISOR:
        raise InvalidGrammar(
            f"cannot be enforced: multipleOf comes to {divisor:,}, whatever the decimal point; the "
            f"limit is {MAX_EVEN_DIVISOR:,}, and {MAX_DIVISOR:,} without its factors of 2 and 5"
        )


def _require_countable(part: Mapping[str, Any]) -> None:
    """Refuse a minProperties that a name given twice would meet: such names count twice."""
    least, required = part.get("minProperties"), part.get("required")
    num_named = len({*map(str, required)}) if isinstance(required, list) else 0
    if isinstance(least, int) and least > num_named + 1:
        raise InvalidGrammar(
            f"cannot be enforced: minProperties is {least:,}; the limit is {num_named + 1:,}, one "
            "more than are required by name"
        )


class _Divisors:
    """By what the numbers of each part of a schema can be divided."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._known: dict[int, int] = {}

    def of(self, part: Any) -> int:  # noqa: ANN401 - any JSON
        if not isinstance(part, dict):
            return 1
        if id(part) not in self._known:
            self._known[id(part)] = 1  # of a part within itself
            own = _digits(part.get("multipleOf"))
            # Alternatives are told apart at once: they cost as much as what holds together.
            lists = (part.get(key) for key in ("allOf", "anyOf", "oneOf"))
            others = [self.of(one) for ones in lists if isinstance(ones, list) for one in ones]
            referred_to = self.of(referred(part, self._whole))
            self._known[id(part)] = math.lcm(own, referred_to, *others)
        return self._known[id(part)]


def _digits(number: Any) -> int:  # noqa: ANN401
    """The digits of a positive number without its decimal point and zeros at its end; 1 if none."""
    if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
        return 1
    digits = Decimal(repr(number)).as_tuple().digits
    return int("".join(map(str, digits)).rstrip("0") or "1")
