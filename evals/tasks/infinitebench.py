"""InfiniteBench's synthetic tasks (arXiv 2402.13718): retrieval and the extremes of a list."""

import statistics
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from evals import templates
from evals.metrics import exact_value, first_integer, first_number
from evals.prose import noise
from evals.tasks.base import CountTokens, Example, Metric, Question, rng_of
from evals.tasks.fill import Supply, hide, most_that_fit
from evals.tasks.needles import uuid
from evals.templates import Template

_MAX_NUMBER = 99


def passkey(rng: Random) -> str:
    """Five digits."""
    return "".join(rng.choices(string.digits, k=5))


def digit_string(rng: Random) -> str:
    """Ten digits: five random ones, then five times a digit is duplicated in place."""
    digits = rng.choices(string.digits, k=5)
    for _ in range(5):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


@dataclass(frozen=True, slots=True)
class HiddenNumberTask:
    """Find a number that is stated twice at one place in noise."""

    name: str
    template: Template
    statement: str
    make_value: Callable[[Random], str]
    max_new_tokens: int
    group: str = "infinitebench"
    metric: Metric = first_integer

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        value = self.make_value(rng)
        question = Question(self.template, {}, (value,))
        statements, depths = [self.statement.format(value=value)], [rng.random()]
        filler = Supply(noise())

        def make(num_pieces: int) -> Example:
            pieces = hide(statements, depths, filler.first(num_pieces))
            return question.around(self, index, "\n".join(pieces))

        return most_that_fit(make, length, count)


@dataclass(frozen=True, slots=True)
class KeyValueTask:
    """Find the value of a key in a JSON object of UUIDs that is as large as fits."""

    name: str = "kv_retrieval"
    group: str = "infinitebench"
    max_new_tokens: int = 50
    metric: Metric = exact_value

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        key, value = uuid(rng), uuid(rng)
        question = Question(templates.KEY_VALUE, {"query": key}, (value,))
        depth = rng.random()
        others = Supply(_pairs(rng))

        def make(num_pieces: int) -> Example:
            pairs = hide([_pair(key, value)], [depth], others.first(num_pieces))
            return question.around(self, index, f"{{{', '.join(pairs)}}}")

        return most_that_fit(make, length, count)


def _pairs(rng: Random) -> Iterator[str]:
    while True:
        yield _pair(uuid(rng), uuid(rng))


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


# What a question may ask about a list, by its name in the question.
STATISTICS: dict[str, Callable[[list[int]], float]] = {
    "largest": max,
    "second largest": lambda numbers: sorted(set(numbers))[-2],
    "third largest": lambda numbers: sorted(set(numbers))[-3],
    "smallest": min,
    "second smallest": lambda numbers: sorted(set(numbers))[1],
    "third smallest": lambda numbers: sorted(set(numbers))[2],
    "median": statistics.median,
}


@dataclass(frozen=True, slots=True)
class MathFindTask:
    """Find the largest, second smallest, median or similar of a list of integers.

    The range is 0 to 99, as in the benchmark, but one end is moved inwards by up to 20 at random.
    """

    name: str = "math_find"
    group: str = "infinitebench"
    max_new_tokens: int = 6  # the benchmark's 3 would truncate a median such as 49.5
    metric: Metric = first_number

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        what = rng.choice(list(STATISTICS))
        numbers = Supply(_integers(rng, *_range(rng, what)))

        def make(num_pieces: int) -> Example:
            listed = numbers.first(num_pieces)
            answer = f"{STATISTICS[what]([int(number) for number in listed]):g}"
            question = Question(templates.MATH_FIND, {"what": what}, (answer,))
            return question.around(self, index, f"[{', '.join(listed)}]")

        return most_that_fit(make, length, count, fewest=20)


def _range(rng: Random, what: str) -> tuple[int, int]:
    """The smallest and the largest integer; the end that is asked for cannot be guessed."""
    margin = rng.randint(0, 20)
    is_upper = "largest" in what or (what == "median" and rng.random() < 0.5)
    return (0, _MAX_NUMBER - margin) if is_upper else (margin, _MAX_NUMBER)


def _integers(rng: Random, least: int, greatest: int) -> Iterator[str]:
    while True:
        yield str(rng.randint(least, greatest))


INFINITEBENCH_TASKS = (
    HiddenNumberTask("passkey", templates.PASSKEY, templates.PASSKEY_NEEDLE, passkey, 6),
    HiddenNumberTask(
        "number_string", templates.NUMBER_STRING, templates.NUMBER_STRING_NEEDLE, digit_string, 12
    ),
    KeyValueTask(),
    MathFindTask(),
)
