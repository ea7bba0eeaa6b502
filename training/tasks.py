"""Facts to hide in a text and questions about them, in the formats of `evals/templates.py`.

This module works on text only: it knows neither tokens nor where in a context a fact ends up.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from evals import templates
from evals.tasks.infinitebench import digit_string
from evals.tasks.needles import listed
from evals.templates import Template
from evals.words import ADJECTIVES, NOUNS, made_up_word

MAX_HOPS = 6
CHAINS = tuple(
    f"chain_{order}_{hops}" for order in ("ordered", "shuffled") for hops in range(1, MAX_HOPS + 1)
)
KINDS = (
    "needle",
    "needle_uuid",
    "needle_uuid_key",
    "multivalue",
    "multiquery",
    "passkey",
    "number_string",
    "json",
    "json_uuid",
    *CHAINS,
)


@dataclass(frozen=True)
class Question:
    """One question, in the benchmark's form and in plainer wordings.

    opening: the benchmark's text before the context.
    asked, lead: its question after the context, and the beginning of the answer.
    wordings: the same question as a person would ask it.
    answer: the exact text expected, without the space before it.
    hops: number of consecutive look-ups that lead to the answer.
    """

    kind: str
    opening: str
    asked: str
    lead: str
    wordings: tuple[str, ...]
    answer: str
    hops: int = 1


@dataclass(frozen=True)
class Fact:
    """Sentences to hide, in this order unless `is_shuffled`, and the questions about them."""

    statements: tuple[str, ...]
    questions: tuple[Question, ...]
    is_shuffled: bool = False


class KeySource:
    """Generates keys that are distinct within one context."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def distinct(self, make: Callable[[random.Random], str]) -> str:
        """Call `make` until its result is new."""
        while (key := make(self._rng)) in self._used:
            pass
        self._used.add(key)
        return key


def word_key(rng: random.Random) -> str:
    """Two words, such as quick-fox; one in six is made up."""
    if rng.random() < 1 / 6:
        return f"{made_up_word(rng)}-{made_up_word(rng)}"
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def variable(rng: random.Random) -> str:
    """A variable name of five capital letters."""
    return "".join(rng.choices(string.ascii_uppercase, k=5))


def random_number(rng: random.Random) -> str:
    """A number of seven digits in half of the cases, else four to six; no leading zero."""
    num_digits = 7 if rng.random() < 0.5 else rng.randint(4, 6)
    return str(rng.randint(10 ** (num_digits - 1), 10**num_digits - 1))


def five_digits(rng: random.Random) -> str:
    """Five digits; the first may be zero."""
    return "".join(rng.choices(string.digits, k=5))


def hexadecimal(rng: random.Random, num_groups: int) -> str:
    """The first groups of a random UUID: 8, 4, 4, 4 and 12 hexadecimal digits."""
    digits = f"{rng.getrandbits(128):032x}"
    groups = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return "-".join(groups[:num_groups])


def make_needles(
    kind: str,
    rng: random.Random,
    keys: KeySource,
    num_groups: int = 5,
    num_keys: int = 1,
    num_values: int = 1,
) -> Fact:
    """`num_values` magic values for each of `num_keys` keys, all asked for in one question."""
    is_number = kind in ("needle", "multivalue", "multiquery")
    noun = "number" if is_number else "uuid"

    def hex_text(source: random.Random) -> str:
        return hexadecimal(source, num_groups)

    make_key = hex_text if kind == "needle_uuid_key" else word_key
    make_value = random_number if is_number else hex_text
    facts = {
        keys.distinct(make_key): [keys.distinct(make_value) for _ in range(num_values)]
        for _ in range(num_keys)
    }
    statements = tuple(
        templates.NEEDLE.format(noun=f"{noun}s", key=key, value=value)
        for key, values in facts.items()
        for value in values
    )
    asked_keys = rng.sample(sorted(facts), num_keys)
    answer = listed([value for key in asked_keys for value in facts[key]])
    query = listed(asked_keys)
    if num_keys * num_values == 1:
        question = _question(kind, templates.NEEDLE_ONE, answer, noun=noun, query=query)
        wordings: tuple[str, ...] = (
            f"What is the special magic {noun} for {query}?",
            f"What is the magic {noun} for {query}?",
            f"Tell me the special magic {noun} for {query}.",
        )
    else:
        question = _question(kind, templates.NEEDLE_MANY, answer, noun=f"{noun}s", query=query)
        wordings = (f"What are the special magic {noun}s for {query}?",)
    return Fact(statements, (question(wordings),))


def make_json(kind: str, rng: random.Random, keys: KeySource, num_pairs: int) -> Fact:
    """A JSON object of `num_pairs` keys: words to numbers, or UUIDs to UUIDs (`json_uuid`)."""

    def uuid(source: random.Random) -> str:
        return hexadecimal(source, 5)

    make_key, make_value = (uuid, uuid) if kind == "json_uuid" else (word_key, random_number)
    pairs = [(keys.distinct(make_key), make_value(rng)) for _ in range(num_pairs)]
    gap = rng.choice((" ", " ", "\n"))
    body = f",{gap}".join(f'"{key}": "{value}"' for key, value in pairs)
    questions = tuple(
        _question(kind, templates.KEY_VALUE, value, query=key)(
            (
                f'What is the value of the key "{key}"?',
                f'What is the value of "{key}" in the JSON object?',
                f'Extract the value of "{key}" from the JSON object.',
            )
        )
        for key, value in pairs
    )
    return Fact((f"{{{body}}}",), questions)


def make_passkey(rng: random.Random) -> Fact:
    """The single pass key of a context."""
    number = five_digits(rng) if rng.random() < 0.6 else random_number(rng)
    wordings = (
        "What is the pass key?",
        "What is the pass key mentioned in the text?",
        "Tell me the pass key.",
    )
    question = _question("passkey", templates.PASSKEY, number)(wordings)
    return Fact((templates.PASSKEY_NEEDLE.format(value=number),), (question,))


def make_number_string(rng: random.Random) -> Fact:
    """The single sequence of digits of a context."""
    digits = digit_string(rng)
    question = _question("number_string", templates.NUMBER_STRING, digits)(
        ("What is the sequence of digits?",)
    )
    return Fact((templates.NUMBER_STRING_NEEDLE.format(value=digits),), (question,))


def make_chain(kind: str, rng: random.Random, keys: KeySource, num_hops: int) -> Fact:
    """A chain of variables: the first is a number, each other one the one before; any is asked."""
    names = [keys.distinct(variable) for _ in range(num_hops)]
    number = keys.distinct(five_digits)
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    end = rng.choice((" ", ".", "."))
    statements = tuple(
        f"VAR {name} = {value}{end}".strip() for name, value in zip(names, values, strict=True)
    )
    is_shuffled = "shuffled" in kind
    questions = tuple(
        _question(
            f"{kind.rsplit('_', 1)[0]}_{hops}",
            templates.CHAIN,
            number,
            hops,
            query=name,
        )((f"What is the value of VAR {name}?", f"What number is assigned to VAR {name}?"))
        for hops, name in enumerate(names, start=1)
    )
    return Fact(statements, questions, is_shuffled)


def _question(
    kind: str,
    template: Template,
    answer: str,
    hops: int = 1,
    **fields: str,
) -> Callable[[tuple[str, ...]], Question]:
    """A question in the benchmark's form; call the result with the plainer wordings."""
    return lambda wordings: Question(
        kind,
        template.opening.format(**fields),
        template.question.format(**fields),
        template.lead.format(**fields),
        wordings,
        answer,
        hops,
    )


def make_fact(kind: str, rng: random.Random, keys: KeySource, size: float = 1.0) -> Fact:
    """A fact of one of `KINDS`; `size` (0 to 1) scales objects, UUIDs and lists."""
    if kind in CHAINS:
        return make_chain(kind, rng, keys, int(kind[-1]))
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind of fact: {kind}; known are {', '.join(KINDS)}")
    return _MAKERS[kind](kind, rng, keys, size)


def _needle(kind: str, rng: random.Random, keys: KeySource, size: float) -> Fact:
    return make_needles(kind, rng, keys, num_groups=max(1, round(5 * size)))


def _json(kind: str, rng: random.Random, keys: KeySource, size: float) -> Fact:
    most = 27 if kind == "json_uuid" else 80  # pairs that fill 2,048 tokens
    return make_json(kind, rng, keys, max(2, round(most * size)))


_MAKERS: dict[str, Callable[[str, random.Random, KeySource, float], Fact]] = {
    "needle": _needle,
    "needle_uuid": _needle,
    "needle_uuid_key": _needle,
    "multivalue": lambda kind, rng, keys, _: make_needles(
        kind, rng, keys, num_values=rng.randint(2, 4)
    ),
    "multiquery": lambda kind, rng, keys, _: make_needles(
        kind, rng, keys, num_keys=rng.randint(2, 4)
    ),
    "passkey": lambda kind, rng, keys, size: make_passkey(rng),
    "number_string": lambda kind, rng, keys, size: make_number_string(rng),
    "json": _json,
    "json_uuid": _json,
}
