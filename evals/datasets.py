"""The benchmarks' original datasets, read from a folder: JSON lines as their scripts write them.

RULER: `<task>/validation.jsonl` with `input`, `outputs` and, in newer versions, `answer_prefix`.
InfiniteBench: `<task>.jsonl` with `context`, `input` and `answer`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evals import templates
from evals.metrics import (
    exact_value,
    first_integer,
    first_number,
    string_match_all,
    string_match_part,
)
from evals.tasks.base import CountTokens, Example, Metric, Task
from winnow.errors import InvalidSetting

_RULER_TASKS: dict[str, tuple[int, Metric]] = {
    **{
        f"niah_{name}": (128, string_match_all)
        for name in (
            *("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3"),
            *("multivalue", "multiquery"),
        )
    },
    "vt": (30, string_match_all),
    "cwe": (120, string_match_all),
    "fwe": (50, string_match_all),
    "qa_1": (32, string_match_part),
    "qa_2": (32, string_match_part),
}
# Opening, lead, max_new_tokens, metric.  In the last two, the file's question ends with the lead.
_INFINITEBENCH_TASKS: dict[str, tuple[str, str, int, Metric]] = {
    "passkey": (templates.PASSKEY.opening, templates.PASSKEY.lead, 6, first_integer),
    "number_string": (
        templates.NUMBER_STRING.opening,
        templates.NUMBER_STRING.lead,
        12,
        first_integer,
    ),
    "kv_retrieval": (
        templates.KEY_VALUE.opening.removesuffix("JSON data:\n"),  # already in the file's context
        "",
        50,
        exact_value,
    ),
    "math_find": (templates.MATH_FIND.opening, "", 6, first_number),
}
_ASKED_FOR = re.compile(r"The (.+) number of")


@dataclass(frozen=True, slots=True)
class RulerFile:
    """A RULER task's `validation.jsonl`."""

    name: str
    path: Path
    max_new_tokens: int
    metric: Metric
    group: str = "ruler"

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        """The example in line `index`; `seed` is ignored."""
        row = _row(self.path, index, ("input", "outputs"))
        prefix = str(row.get("answer_prefix") or "")
        text = str(row["input"]).removesuffix(prefix)
        answers = _answers(self.path, index, row["outputs"])
        return _fitting(
            Example(self.name, index, "", text, "", prefix, answers, self.max_new_tokens),
            length,
            count,
        )


@dataclass(frozen=True, slots=True)
class InfiniteBenchFile:
    """An InfiniteBench task's `.jsonl`.

    opening: text before the context; `{what}` in it is replaced by what the question asks for.
    lead: beginning of the answer, if the file's question lacks it.
    """

    name: str
    path: Path
    opening: str
    lead: str
    max_new_tokens: int
    metric: Metric
    group: str = "infinitebench"

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        """The example in line `index`; `seed` is ignored."""
        row = _row(self.path, index, ("context", "input", "answer"))
        question = str(row["input"])
        asked_for = _ASKED_FOR.search(question)
        return _fitting(
            Example(
                self.name,
                index,
                self.opening.format(what=asked_for[1] if asked_for else ""),
                str(row["context"]),
                f"\n\n{question}",
                self.lead,
                _answers(self.path, index, row["answer"]),
                self.max_new_tokens,
            ),
            length,
            count,
        )


def original_tasks(data_dir: Path) -> Sequence[Task]:
    """The tasks of both benchmarks; a task's file is read when its first example is made."""
    ruler = [
        RulerFile(name, data_dir / name / "validation.jsonl", max_new_tokens, metric)
        for name, (max_new_tokens, metric) in _RULER_TASKS.items()
    ]
    infinitebench = [
        InfiniteBenchFile(name, data_dir / f"{name}.jsonl", *about)
        for name, about in _INFINITEBENCH_TASKS.items()
    ]
    return [*ruler, *infinitebench]


def _row(path: Path, index: int, fields: Sequence[str]) -> dict[str, Any]:
    lines = _lines(path)
    if index >= len(lines):
        raise InvalidSetting(
            f"{path} has {len(lines):,} examples; example {index + 1:,} was asked for",
            param="samples",
        )
    try:
        row = json.loads(lines[index])
    except ValueError as error:
        raise InvalidSetting(f"{path}, example {index + 1:,}, is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidSetting(f"{path}, example {index + 1:,}, is not a JSON object")
    missing = [field for field in fields if row.get(field) in (None, "", [])]
    if missing:
        raise InvalidSetting(f"{path}, example {index + 1:,}, lacks {', '.join(missing)}")
    return row


def _answers(path: Path, index: int, found: object) -> tuple[str, ...]:
    """The reference answers as strings; `found` is a string or number, or a list of them."""
    answers = found if isinstance(found, list) else [found]
    wrong = [
        answer for answer in answers if answer == "" or not isinstance(answer, str | int | float)
    ]
    if wrong:
        raise InvalidSetting(f"{path}, example {index + 1:,}, has {wrong[0]!r} for an answer")
    return tuple(map(str, answers))


@cache
def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise InvalidSetting(f"{path} is missing in the data folder", param="data_dir") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{path} cannot be read: {error}", param="data_dir") from error


def _fitting(example: Example, length: int, count: CountTokens) -> Example:
    num_tokens = count(example.prompt())
    if num_tokens > length:
        raise InvalidSetting(
            f"example {example.index + 1:,} of {example.task} has {num_tokens:,} tokens; "
            f"the length is {length:,}",
            param="length",
        )
    return example
