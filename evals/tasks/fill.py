"""Fills prompts to a given length: as many context pieces as fit, with statements among them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from evals.tasks.base import CountTokens, Example
from winnow.errors import InvalidSetting

_FIRST_STEP = 8  # pieces added first, to estimate the tokens of one


@dataclass(frozen=True, slots=True)
class _Tried:
    """An example with `num_pieces` pieces, and the tokens of its prompt."""

    example: Example
    num_pieces: int
    num_tokens: int


def most_that_fit(
    make: Callable[[int], Example], length: int, count: CountTokens, fewest: int = 0
) -> Example:
    """The example with the most pieces whose prompt has at most `length` tokens.

    make: makes the example with a number of pieces, at least `fewest`; prompts grow with it.
    Whole prompts are counted, since joined pieces may have another number of tokens.
    Raises InvalidSetting if even `fewest` pieces are too long.
    """

    def attempt(num_pieces: int) -> _Tried:
        example = make(num_pieces)
        return _Tried(example, num_pieces, count(example.prompt()))

    first = fits = attempt(fewest)
    if first.num_tokens > length:
        raise InvalidSetting(
            f"task {first.example.task} needs at least {first.num_tokens:,} prompt tokens "
            f"with this model; there is room for {length:,}",
            param="length",
        )
    over: _Tried | None = None
    while over is None or over.num_pieces - fits.num_pieces > 1:
        tried = attempt(_next_guess(length, first, fits, over))
        if tried.num_tokens <= length:
            fits = tried
        else:
            over = tried
    return fits.example


def _next_guess(length: int, first: _Tried, fits: _Tried, over: _Tried | None) -> int:
    """A larger number of pieces than fit so far, by linear interpolation to `length`."""
    other = over or first
    if other is fits:
        return first.num_pieces + _FIRST_STEP
    room, pieces = length - fits.num_tokens, other.num_pieces - fits.num_pieces
    guess = fits.num_pieces + max(1, room * pieces // (other.num_tokens - fits.num_tokens))
    return guess if over is None else min(guess, over.num_pieces - 1)


@dataclass
class Supply:
    """Pieces from an iterator, cached so that each is made once."""

    pieces: Iterator[str]
    _made: list[str] = field(default_factory=list)

    def first(self, num_pieces: int) -> list[str]:
        self._made += islice(self.pieces, max(0, num_pieces - len(self._made)))
        return self._made[:num_pieces]


def hide(statements: Sequence[str], depths: Sequence[float], filler: Sequence[str]) -> list[str]:
    """The filler with `statements` inserted, in their order.

    depths: for each statement, the share of the filler before it, 0 to 1, ascending.
    """
    pieces: list[str] = []
    start = 0
    for depth, statement in zip(depths, statements, strict=True):
        place = round(depth * len(filler))
        pieces += [*filler[start:place], statement]
        start = place
    return [*pieces, *filler[start:]]
