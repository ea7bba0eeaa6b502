"""RULER's aggregation tasks: find the words that occur most often."""

import math
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from evals import templates
from evals.metrics import string_match_all
from evals.tasks.base import CountTokens, Example, Metric, Question, rng_of
from evals.tasks.fill import Supply, most_that_fit
from evals.words import ADJECTIVES, NOUNS, VERBS, made_up_word

_NUM_COMMON = 10


@dataclass(frozen=True, slots=True)
class _Repeats:
    """How often common and uncommon words occur in a numbered list."""

    common: int
    uncommon: int


@dataclass(frozen=True, slots=True)
class _Size:
    """Repeats in the list that is asked about, and in the worked example's list of `num_words`."""

    asked: _Repeats
    worked: _Repeats
    num_words: int


_SHORT = _Size(_Repeats(6, 1), _Repeats(3, 1), 20)
_LONG = _Size(_Repeats(30, 3), _Repeats(10, 3), 40)
_LONG_TOKENS = 4096  # from this length on, the benchmark uses the long size


@dataclass(frozen=True, slots=True)
class CommonWordsTask:
    """Ten words of a numbered list occur in it more often than the others (cwe).

    The prompt begins with an answered question about a short list, as in the benchmark.
    """

    name: str = "cwe"
    group: str = "ruler"
    max_new_tokens: int = 120
    metric: Metric = string_match_all

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        if length >= _LONG_TOKENS:
            make = self._maker(index, seed, length, _LONG)
            # If words take many tokens, the long size may not fit yet.
            if count(make(_NUM_COMMON).prompt()) <= length:
                return most_that_fit(make, length, count, fewest=_NUM_COMMON)
        make = self._maker(index, seed, length, _SHORT)
        return most_that_fit(make, length, count, fewest=_NUM_COMMON)

    def _maker(self, index: int, seed: int, length: int, size: _Size) -> Callable[[int], Example]:
        """A function that makes the example with a given number of uncommon words."""
        rng = rng_of(self.name, index, seed, length)
        preface = self._worked_example(rng, index, size)
        words = Supply(_words(rng))
        common = tuple(words.first(_NUM_COMMON))
        question = Question(templates.COMMON_WORDS, {}, common, preface=preface)
        order = rng.random()

        def make(num_others: int) -> Example:
            listed = words.first(_NUM_COMMON + num_others)
            return question.around(self, index, _numbered_list(listed, size.asked, order))

        return make

    def _worked_example(self, rng: Random, index: int, size: _Size) -> str:
        words = Supply(_words(rng)).first(size.num_words)
        common = words[:_NUM_COMMON]
        question = Question(templates.COMMON_WORDS, {}, tuple(common))
        context = _numbered_list(words, size.worked, rng.random())
        return f"{question.around(self, index, context).prompt()} {_numbered(common)}\n"


def _words(rng: Random) -> Iterator[str]:
    """Endless distinct words, real ones first."""
    known = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    rng.shuffle(known)
    yield from known
    used = set(known)
    while True:
        if (word := made_up_word(rng)) not in used:
            used.add(word)
            yield word


def _numbered_list(words: list[str], repeats: _Repeats, order: float) -> str:
    """The words, repeated and shuffled with seed `order`; `words` starts with the common ones."""
    listed = words[:_NUM_COMMON] * repeats.common + words[_NUM_COMMON:] * repeats.uncommon
    Random(order).shuffle(listed)
    return _numbered(listed)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


@dataclass(frozen=True, slots=True)
class FrequentWordsTask:
    """Coded words with zeta-distributed frequencies; dots are the most frequent (fwe)."""

    name: str = "fwe"
    group: str = "ruler"
    max_new_tokens: int = 50
    metric: Metric = string_match_all

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        rng = rng_of(self.name, index, seed, length)
        words = ["...", *_coded_words(rng, max(8, length // 50))]
        question = Question(templates.FREQUENT_WORDS, {}, tuple(words[1:4]))
        order = rng.random()

        def make(num_words: int) -> Example:
            frequencies = zeta_frequencies(num_words, len(words))
            listed = [w for w, n in zip(words, frequencies, strict=True) for _ in range(n)]
            Random(order).shuffle(listed)
            return question.around(self, index, " ".join(listed))

        return most_that_fit(make, length, count, fewest=34)  # with fewer words, ranks are tied


def _coded_words(rng: Random, num_words: int) -> list[str]:
    """Distinct words of six random letters."""
    words: dict[str, None] = {}
    while len(words) < num_words:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(words)


def zeta_frequencies(num_words: int, num_ranks: int) -> list[int]:
    """How often each rank occurs among `num_words`: floor(num_words · rank⁻² / ζ(2))."""
    zeta = math.pi**2 / 6
    return [int(num_words / (rank**2 * zeta)) for rank in range(1, num_ranks + 1)]


COUNTING_TASKS = (CommonWordsTask(), FrequentWordsTask())
