"""The user's own prompts as a task."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from evals.metrics import string_match_part
from evals.tasks.base import CountTokens, Example, Metric
from winnow.errors import InvalidSetting

TASK_NAME = "prompts"
_FIELDS = {"prompt", "answers"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """answers: any of them is right; none: the unpruned answer is."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PromptsTask:
    """Prompts in an order of their own; an answer is right that has a reference, or agrees."""

    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    metric: Metric
    name: str = TASK_NAME
    group: str = TASK_NAME

    @property
    def has_answers(self) -> bool:
        return self.metric is string_match_part

    def digest(self) -> str:
        """Tells these prompts and answers from others."""
        rows = [[prompt.text, prompt.answers] for prompt in self.prompts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def with_answers(self, answers: Sequence[str]) -> "PromptsTask":
        """The same prompts with what the unpruned model answers."""
        pairs = zip(self.prompts, answers, strict=True)
        return replace(self, prompts=tuple(Prompt(p.text, (answer,)) for p, answer in pairs))

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        """Prompt `index`; `seed` has no say."""
        prompt = self.prompts[index]
        num_tokens = count(prompt.text)
        if num_tokens > length:
            raise InvalidSetting(
                f"a prompt has {num_tokens:,} tokens; with its answer and the model's own tokens "
                f"there is room for {length:,}",
                param="prompts",
            )
        return Example(
            self.name, index, prompt.text, "", "", "", prompt.answers, self.max_new_tokens
        )


def agreement(answer: str, references: Sequence[str]) -> float:
    """Share of words until an answer leaves the unpruned one; 1 before that one is known."""
    if not references:
        return 1.0
    own, unpruned = answer.split(), references[0].split()
    same = 0
    while same < min(len(own), len(unpruned)) and own[same] == unpruned[same]:
        same += 1
    return same / max(len(own), len(unpruned), 1)


def read_prompts(file: Path, max_new_tokens: int, seed: int) -> PromptsTask:
    """The prompts of a JSON Lines file, shuffled: fields `prompt` and, in all or none, `answers`.

    Raises InvalidSetting for a file or a line that is not so.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(
            f"--prompts {file} cannot be read: {error}", param="prompts"
        ) from error
    prompts = [_parse(file, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    answered = sum(bool(prompt.answers) for prompt in prompts)
    if 0 < answered < len(prompts):
        raise InvalidSetting(
            f"--prompts {file}: {answered:,} of {len(prompts):,} prompts have answers; give all of "
            "them, or none",
            param="prompts",
        )
    Random(seed).shuffle(prompts)
    metric = string_match_part if answered else agreement
    return PromptsTask(tuple(prompts), max_new_tokens, metric)


def _parse(file: Path, number: int, line: str) -> Prompt:
    where = f"--prompts {file}, line {number}"
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InvalidSetting(f"{where}, is not JSON: {error}", param="prompts") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise InvalidSetting(f"{where}, has no text in the field prompt", param="prompts")
    if unknown := sorted(row.keys() - _FIELDS):
        raise InvalidSetting(
            f"{where}: {unknown[0]} is not a field; known are answers and prompt", param="prompts"
        )
    answers = row.get("answers")
    listed = answers if isinstance(answers, list) else [] if answers is None else [answers]
    if any(not isinstance(answer, str) or not answer for answer in listed):
        raise InvalidSetting(f"{where}: answers must be texts", param="prompts")
    return Prompt(row["prompt"], tuple(listed))
