"""Filler prose in five styles, without any fact that a question asks about.

English text comes from Python's own documentation (`pydoc_data`, in every installation), for real
words and punctuation without a download.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import repeat
from pydoc_data import topics

from evals.words import ADJECTIVES, ADVERBS, NOUNS, PREPOSITIONS, VERBS, made_up_word

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_PRINTABLE = "".join(chr(code) for code in range(33, 127)) + "éüñøß“”–…€漢字のд"


@cache
def documentation_sentences() -> tuple[str, ...]:
    """Sentences of Python's language reference, 20 to 200 characters each, in a fixed order."""
    sentences = []
    for name in sorted(topics.topics):
        text = re.sub(r"\s+", " ", topics.topics[name].replace("*", "").replace("`", ""))
        sentences += re.findall(r"[A-Z][^.!?]{20,200}[.!?](?= |$)", text)
    return tuple(sentences)


def template_sentence(rng: random.Random) -> str:
    """A grammatical sentence of random words, from the same vocabulary as the keys."""

    def thing() -> str:
        adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.5 else ""
        return f"the {adjective}{rng.choice(NOUNS)}"

    def clause() -> str:
        return f"{thing()} {rng.choice(VERBS)} {thing()}"

    def place() -> str:
        return f"{rng.choice(PREPOSITIONS)} {thing()}"

    sentence = rng.choice(
        (
            lambda: f"{clause()} {place()}",
            lambda: f"{rng.choice(ADVERBS)} {clause()}",
            lambda: f"{clause()}, and {clause()}",
            lambda: f"{place()}, {clause()} {rng.choice(ADVERBS)}",
            lambda: f"{thing()} is {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}",
            lambda: f"in {rng.randint(1200, 2100)} {clause()} {place()}",
            lambda: f"there are {rng.randint(2, 999)} {rng.choice(NOUNS)}s {place()}",
        )
    )()
    return sentence[0].upper() + sentence[1:] + "."


def _documentation(rng: random.Random) -> str:
    return rng.choice(documentation_sentences())


def _noise(rng: random.Random) -> str:
    return " ".join(_NOISE)


def _made_up(rng: random.Random) -> str:
    return " ".join(made_up_word(rng) for _ in range(rng.randint(3, 9))).capitalize() + "."


def _characters(rng: random.Random) -> str:
    words = (
        "".join(rng.choices(_PRINTABLE, k=rng.randint(1, 8))) for _ in range(rng.randint(2, 6))
    )
    return "Also " + " ".join(words) + "."


_STYLES: tuple[tuple[Callable[[random.Random], str], ...], ...] = (
    (template_sentence,),
    (_documentation,),
    (template_sentence, _documentation),
    (_noise,),
    (template_sentence, _documentation, _noise, _made_up, _characters),
)
_STYLE_WEIGHTS = (35, 25, 15, 10, 15)


def noise() -> Iterator[str]:
    """RULER's noise, endlessly."""
    return repeat(" ".join(_NOISE))


def essay(rng: random.Random) -> Iterator[str]:
    """Endless prose, in place of RULER's essays: documentation and template sentences."""
    while True:
        yield rng.choice((template_sentence, _documentation))(rng)


def pick_style(rng: random.Random) -> Callable[[random.Random], str]:
    """A sentence generator for one context, so that each context has one kind of prose."""
    (makers,) = rng.choices(_STYLES, weights=_STYLE_WEIGHTS)
    return lambda sentence_rng: sentence_rng.choice(makers)(sentence_rng)
