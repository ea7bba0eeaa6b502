"""Facts to hide in a text and the questions about them: needles, JSON keys, passkeys, chains.

Knows text only: neither tokens nor where in a context a fact ends up.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from training.words import ADJECTIVES, NOUNS, made_up_word

KINDS = ("needle", "json", "passkey", "chain2", "chain3")


@dataclass(frozen=True)
class Question:
    """One question in several wordings.

    wordings: complete questions, any of which may be asked.
    lead: the beginning of a sentence that the answer completes.
    answer: the exact text expected, without the space before it.
    """

    kind: str
    wordings: tuple[str, ...]
    lead: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """Sentences to hide, in this order, and what may be asked about them."""

    statements: tuple[str, ...]
    questions: tuple[Question, ...]


class KeySource:
    """Hands out keys that are distinct within one context."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def _distinct(self, make: Callable[[], str]) -> str:
        while (key := make()) in self._used:
            pass
        self._used.add(key)
        return key

    def pair(self) -> str:
        """A key of two words, such as quick-fox; one in six is made up."""
        return self._distinct(self._pair)

    def _pair(self) -> str:
        if self._rng.random() < 1 / 6:
            return f"{made_up_word(self._rng)}-{made_up_word(self._rng)}"
        return f"{self._rng.choice(ADJECTIVES)}-{self._rng.choice(NOUNS)}"

    def variable(self) -> str:
        """A variable name of three capital letters."""
        return self._distinct(lambda: "".join(self._rng.choices(string.ascii_uppercase, k=3)))


def random_number(rng: random.Random) -> str:
    """Four to seven digits, the first of them not zero."""
    num_digits = rng.randint(4, 7)
    return str(rng.randint(10 ** (num_digits - 1), 10**num_digits - 1))


def make_needle(rng: random.Random, keys: KeySource) -> Fact:
    """The magic number of one key."""
    key, number = keys.pair(), random_number(rng)
    question = Question(
        "needle",
        (
            f"What is the special magic number for {key}?",
            f"What is the special magic number for {key} mentioned in the provided text?",
            f"What is the magic number for {key}?",
            f"Tell me the special magic number for {key}.",
        ),
        f"The special magic number for {key} mentioned in the provided text is",
        number,
    )
    return Fact((f"One of the special magic numbers for {key} is: {number}.",), (question,))


def make_json(rng: random.Random, keys: KeySource, num_pairs: int) -> Fact:
    """A JSON object of `num_pairs` keys with numbers as strings."""
    pairs = [(keys.pair(), random_number(rng)) for _ in range(num_pairs)]
    gap = rng.choice((" ", "\n"))
    body = f",{gap}".join(f'"{key}": "{number}"' for key, number in pairs)
    questions = tuple(
        Question(
            "json",
            (
                f'What is the value of the key "{key}"?',
                f'What is the value of "{key}" in the JSON object?',
                f'Extract the value of "{key}" from the JSON object.',
            ),
            f'The value of "{key}" is',
            number,
        )
        for key, number in pairs
    )
    return Fact((f"{{{body}}}",), questions)


def make_passkey(rng: random.Random, keys: KeySource) -> Fact:
    """The one pass key of a context."""
    number = random_number(rng)
    question = Question(
        "passkey",
        (
            "What is the pass key?",
            "What is the pass key mentioned in the text?",
            "Tell me the pass key.",
        ),
        "The pass key is",
        number,
    )
    return Fact((f"The pass key is {number}. Remember it. {number} is the pass key.",), (question,))


def make_chain(rng: random.Random, keys: KeySource, num_hops: int) -> Fact:
    """Variables assigned in order, the first from a number, each other one from the one before."""
    names, number = [keys.variable() for _ in range(num_hops)], random_number(rng)
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    name = names[-1]
    question = Question(
        f"chain{num_hops}",
        (
            f"What is the value of VAR {name}?",
            f"What number is assigned to VAR {name}?",
            f"Tell me the value of VAR {name}.",
        ),
        f"The value of VAR {name} is",
        number,
    )
    statements = tuple(f"VAR {name} = {value}." for name, value in zip(names, values, strict=True))
    return Fact(statements, (question,))


def make_fact(kind: str, rng: random.Random, keys: KeySource, num_pairs: int = 6) -> Fact:
    """A fact of one of `KINDS` (or chain1, a variable assigned directly)."""
    match kind:
        case "needle":
            return make_needle(rng, keys)
        case "json":
            return make_json(rng, keys, num_pairs)
        case "passkey":
            return make_passkey(rng, keys)
        case "chain1" | "chain2" | "chain3":
            return make_chain(rng, keys, int(kind[-1]))
    raise ValueError(f"unknown kind of fact: {kind}; known are {', '.join(KINDS)}")
