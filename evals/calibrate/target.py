"""What settings are wanted to reach, and which of those measured reach it best."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from winnow.errors import InvalidSetting

_SHARE = re.compile(r"(\d{1,3}(?:\.\d+)?)%|(0?\.\d+|1(?:\.0+)?)")


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """What counts: shares of the unpruned score kept, and of the prefill computed."""

    kept: float
    prefill: float


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Either the share of the unpruned score to keep, or of the prefill to compute at most."""

    keep: float | None
    prefill: float | None

    def reached_by(self, found: Tradeoff) -> bool:
        if self.prefill is not None:
            return found.prefill <= self.prefill
        assert self.keep is not None
        return found.kept >= self.keep

    def order(self, found: Tradeoff) -> tuple[float, float]:
        """Sorts what reaches the target: the best first."""
        if self.prefill is not None:
            return (-found.kept, found.prefill)
        return (found.prefill, -found.kept)

    def best(self, tried: Sequence[T], figures: Callable[[T], Tradeoff]) -> T | None:
        """The best that reaches the target, the earlier of equals; None if there is none."""
        reaching = [one for one in tried if self.reached_by(figures(one))]
        return min(reaching, key=lambda one: self.order(figures(one)), default=None)

    def prefers(self, one: Tradeoff | None, other: Tradeoff | None) -> bool:
        """Whether `one` is better: nearer to the target, or beyond it by more.  None is worst."""
        return self._rank(one) < self._rank(other)

    def _rank(self, found: Tradeoff | None) -> tuple[float, ...]:
        if found is None:
            return (2,)
        if self.reached_by(found):
            return (0, *self.order(found))
        by_prefill, by_score = (found.prefill, -found.kept), (-found.kept, found.prefill)
        return (1, *(by_score if self.prefill is None else by_prefill))

    def __str__(self) -> str:
        if self.prefill is not None:
            return f"computes {self.prefill:.1%} of prefill"
        return f"keeps {self.keep:.1%} of the unpruned score"


def parse_share(flag: str, text: str) -> float:
    """`25%` or `0.25`, above 0 and up to 1.  Raises InvalidSetting."""
    found = _SHARE.fullmatch(text)
    value = 0.0 if found is None else float(found[1]) / 100 if found[1] else float(found[2])
    if not 0 < value <= 1:
        raise InvalidSetting(f"--{flag} {text!r} is not a share like 65%, up to 100%", param=flag)
    return value
