"""RULER's needle tasks (arXiv 2404.06654, table 2) and needle-in-a-haystack by depth."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from uuid import UUID

from evals import templates
from evals.metrics import string_match_all
from evals.prose import essay, noise
from evals.tasks.base import CountTokens, Example, Metric, Question, rng_of
from evals.tasks.fill import Supply, hide, most_that_fit
from evals.words import ADJECTIVES, NOUNS

MAX_NEW_TOKENS = 128


def word_key(rng: Random) -> str:
    """Two words, such as quick-fox."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: Random) -> str:
    """Seven digits."""
    return str(rng.randint(10**6, 10**7 - 1))


def uuid(rng: Random) -> str:
    """A random UUID (version 4)."""
    return str(UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """Find the values of keys that are hidden in a haystack.

    haystack: noise, prose, or needles (the same statements with other keys).
    num_keys: keys hidden, of which num_asked are asked for; each has num_values values.
    """

    name: str
    haystack: str
    make_key: Callable[[Random], str] = word_key
    make_value: Callable[[Random], str] = number
    num_keys: int = 1
    num_asked: int = 1
    num_values: int = 1
    group: str = "ruler"
    max_new_tokens: int = MAX_NEW_TOKENS
    metric: Metric = string_match_all

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        return self.at(index, seed, length, count, None)

    def at(
        self, index: int, seed: int, length: int, count: CountTokens, depth: float | None
    ) -> Example:
        """An example with its needles at `depth`, 0 to 1; at random depths if None."""
        rng = rng_of(self.name, index, seed, length)
        needles = self._needles(rng)
        statements = [self._statement(key, v) for key, values in needles.items() for v in values]
        rng.shuffle(statements)
        depths = sorted(rng.random() if depth is None else depth for _ in statements)
        question = self._question(rng, needles, depth)
        filler = Supply(self._filler(rng, needles))
        separator = " " if self.haystack == "prose" else "\n"

        def make(num_pieces: int) -> Example:
            pieces = hide(statements, depths, filler.first(num_pieces))
            return question.around(self, index, separator.join(pieces))

        return most_that_fit(make, length, count)

    @property
    def _noun(self) -> str:
        return "uuid" if self.make_value is uuid else "number"

    def _needles(self, rng: Random) -> dict[str, list[str]]:
        needles: dict[str, list[str]] = {}
        while len(needles) < self.num_keys:
            needles[self.make_key(rng)] = [self.make_value(rng) for _ in range(self.num_values)]
        return needles

    def _statement(self, key: str, value: str) -> str:
        return templates.NEEDLE.format(noun=f"{self._noun}s", key=key, value=value)

    def _question(
        self, rng: Random, needles: dict[str, list[str]], depth: float | None
    ) -> Question:
        keys = rng.sample(sorted(needles), self.num_asked)
        answers = tuple(value for key in keys for value in needles[key])
        is_one = len(answers) == 1
        template = templates.NEEDLE_ONE if is_one else templates.NEEDLE_MANY
        noun = self._noun if is_one else f"{self._noun}s"
        return Question(template, {"noun": noun, "query": listed(keys)}, answers, depth)

    def _filler(self, rng: Random, needles: dict[str, list[str]]) -> Iterator[str]:
        if self.haystack == "needles":
            return self._other_needles(rng, needles)
        return noise() if self.haystack == "noise" else essay(rng)

    def _other_needles(self, rng: Random, needles: dict[str, list[str]]) -> Iterator[str]:
        while True:
            key = self.make_key(rng)
            if key not in needles:
                yield self._statement(key, self.make_value(rng))


def listed(items: list[str]) -> str:
    """`a`, or `a, b, and c`, as RULER lists its keys."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


@dataclass(frozen=True, slots=True)
class DepthTask:
    """One needle in prose, at depths from the first to the last sentence (NIAH).

    Example i uses depth i mod num_depths.
    """

    num_depths: int
    name: str = "niah"
    group: str = "niah"
    max_new_tokens: int = MAX_NEW_TOKENS
    metric: Metric = string_match_all

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        steps = max(1, self.num_depths - 1)
        depth = (index % self.num_depths) / steps
        return NeedleTask(self.name, "prose").at(index, seed, length, count, depth)


NEEDLE_TASKS = (
    NeedleTask("niah_single_1", "noise"),
    NeedleTask("niah_single_2_prose", "prose"),
    NeedleTask("niah_single_3_prose", "prose", make_value=uuid),
    NeedleTask("niah_multikey_1_prose", "prose", num_keys=4),
    NeedleTask("niah_multikey_2", "needles"),
    NeedleTask("niah_multikey_3", "needles", make_key=uuid, make_value=uuid),
    NeedleTask("niah_multivalue_prose", "prose", num_values=4),
    NeedleTask("niah_multiquery_prose", "prose", num_keys=4, num_asked=4),
)
