"""The benchmarks' metrics: the score of one answer, 0 to 1."""

import re
from collections.abc import Sequence

_INTEGER = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_KEY_VALUE_BREAKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains, ignoring case (RULER)."""
    return sum(_contains(answer, reference) for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains any of the references, ignoring case (RULER's QA tasks)."""
    return float(any(_contains(answer, reference) for reference in references))


def first_integer(answer: str, references: Sequence[str]) -> float:
    """1 if the first run of digits equals the reference (InfiniteBench passkey, number_string)."""
    found = _INTEGER.search(answer)
    return float(found is not None and found[0] == references[0])


def first_number(answer: str, references: Sequence[str]) -> float:
    """1 if the first number equals the reference's (InfiniteBench math_find)."""
    found, expected = _NUMBER.search(answer), _NUMBER.search(references[0])
    if found is None or expected is None:
        return 0.0
    return float(float(found[0]) == float(expected[0]))


def exact_value(answer: str, references: Sequence[str]) -> float:
    """1 if the reference is a word of the answer, ignoring punctuation (kv_retrieval)."""
    return float(references[0] in answer.translate(_KEY_VALUE_BREAKS).split())


def _contains(answer: str, reference: str) -> bool:
    return reference.lower() in answer.lower()
