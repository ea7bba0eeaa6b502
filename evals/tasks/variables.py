"""Tasks on chains of variable assignments: RULER's variable tracking, and following a chain."""

import string
from dataclasses import dataclass
from random import Random

from evals import templates
from evals.metrics import string_match_all
from evals.prose import noise
from evals.tasks.base import CountTokens, Example, Metric, Question, rng_of
from evals.tasks.fill import Supply, hide, most_that_fit

NUM_CHAINS = 4
MAX_HOPS = 6
WORKED_EXAMPLE_TOKENS = 500


def variables(rng: Random, num_names: int, num_letters: int = 5) -> list[str]:
    """Distinct names made of capital letters."""
    names: dict[str, None] = {}
    while len(names) < num_names:
        names["".join(rng.choices(string.ascii_uppercase, k=num_letters))] = None
    return list(names)


def value(rng: Random) -> str:
    """Five digits."""
    return str(rng.randint(10_000, 99_999))


def chain(names: list[str], number: str) -> list[str]:
    """Assignments in order: the first to a number, each other one to the previous name."""
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {value}" for name, value in zip(names, values, strict=True)]


@dataclass(frozen=True, slots=True)
class TrackingTask:
    """Find all variables of one chain of four hops, in noise (vt).

    has_worked_example: the prompt begins with an answered question about a short text, as in the
    benchmark.
    """

    name: str = "vt"
    has_worked_example: bool = True
    group: str = "ruler"
    num_hops: int = 4
    max_new_tokens: int = 48  # the benchmark's 30 would truncate if each letter is a token
    metric: Metric = string_match_all

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        preface = self._worked_example(rng, index, length, count) if self.has_worked_example else ""
        return self._tracked(rng, index, length, count, 5, preface)

    def _worked_example(self, rng: Random, index: int, length: int, count: CountTokens) -> str:
        num_tokens = min(WORKED_EXAMPLE_TOKENS, length // 2)
        example = self._tracked(rng, index, num_tokens, count, 3, "")
        return f"{example.prompt()} {' '.join(example.answers)}\n\n"

    def _tracked(
        self,
        rng: Random,
        index: int,
        length: int,
        count: CountTokens,
        num_letters: int,
        preface: str,
    ) -> Example:
        names, number = variables(rng, self.num_hops + 1, num_letters), value(rng)
        fields = {"query": number, "count": str(len(names))}
        question = Question(templates.VARIABLES, fields, tuple(names), preface=preface)
        depths = sorted(rng.random() for _ in names)
        filler = Supply(noise())

        def make(num_pieces: int) -> Example:
            pieces = hide(chain(names, number), depths, filler.first(num_pieces))
            return question.around(self, index, "\n".join(pieces))

        return most_that_fit(make, length, count)


@dataclass(frozen=True, slots=True)
class ChainTask:
    """Find the value of the last variable of one of several chains, in order or shuffled."""

    num_hops: int
    is_shuffled: bool
    group: str = "chains"
    max_new_tokens: int = 16
    metric: Metric = string_match_all

    @property
    def name(self) -> str:
        return f"chain_{'shuffled' if self.is_shuffled else 'ordered'}_{self.num_hops}"

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        names = variables(rng, NUM_CHAINS * self.num_hops)
        chains = [names[i::NUM_CHAINS] for i in range(NUM_CHAINS)]
        numbers = [value(rng) for _ in chains]
        statements = self._mixed(rng, [chain(*pair) for pair in zip(chains, numbers, strict=True)])
        question = Question(templates.CHAIN, {"query": chains[0][-1]}, (numbers[0],))
        depths = sorted(rng.random() for _ in statements)
        filler = Supply(noise())

        def make(num_pieces: int) -> Example:
            pieces = hide(statements, depths, filler.first(num_pieces))
            return question.around(self, index, "\n".join(pieces))

        return most_that_fit(make, length, count)

    def _mixed(self, rng: Random, chains: list[list[str]]) -> list[str]:
        """All links, randomly interleaved; each chain's own order is kept unless shuffled."""
        if self.is_shuffled:
            for links in chains:
                rng.shuffle(links)
        order = [chain_idx for chain_idx, links in enumerate(chains) for _ in links]
        rng.shuffle(order)
        waiting = [iter(links) for links in chains]
        return [f"{next(waiting[chain_idx])}." for chain_idx in order]


VARIABLE_TASKS = (TrackingTask(),)
ZERO_SHOT_TASKS = (TrackingTask("vt_zero_shot", has_worked_example=False, group="zero_shot"),)
CHAIN_TASKS = tuple(
    ChainTask(num_hops, is_shuffled)
    for is_shuffled in (False, True)
    for num_hops in range(1, MAX_HOPS + 1)
)
