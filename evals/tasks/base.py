"""What every task gives: examples, each a prompt of about the length asked for and its answers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from evals.templates import Template

# Tokens of a text in the model's own tokenizer, without special ones.
CountTokens = Callable[[str], int]
# (answer text, references) -> score, 0 to 1.
Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, in four parts, and what is right.

    depth: where in the context the needle stands, 0 (first) to 1; None where that is not the point.
    """

    task: str
    index: int
    opening: str
    context: str
    question: str
    lead: str
    answers: tuple[str, ...]
    max_new_tokens: int
    depth: float | None = None

    def prompt(self) -> str:
        """For plain completion: the benchmark's whole text, the answer's beginning included."""
        return f"{self.opening}{self.context}{self.question}{self.lead}"

    def user_message(self) -> str:
        """For a chat: without the answer's beginning, which is not the user's to write."""
        return f"{self.opening}{self.context}{self.question}"


class Task(Protocol):
    """A named source of examples and their metric."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def metric(self) -> Metric: ...

    def example(self, index: int, seed: int, length: int, count: CountTokens) -> Example:
        """Example `index`: a pure function of task, seed, length, index and tokenizer.

        Its prompt has at most `length` tokens, as `count` counts them.
        Raises InvalidSetting if the length holds no example of this task.
        """


@dataclass(frozen=True, slots=True)
class Question:
    """A template, what fills its fields, and what is right.

    preface: what the prompt has before the template's opening.
    """

    template: Template
    fields: dict[str, str]
    answers: tuple[str, ...]
    depth: float | None = None
    preface: str = ""

    def around(self, task: Task, index: int, context: str) -> Example:
        """The question about a context."""
        return Example(
            task=task.name,
            index=index,
            opening=self.preface + self.template.opening.format(**self.fields),
            context=context,
            question=self.template.question.format(**self.fields),
            lead=self.template.lead.format(**self.fields),
            answers=self.answers,
            max_new_tokens=task.max_new_tokens,
            depth=self.depth,
        )


def rng_of(task: str, index: int, seed: int, length: int) -> random.Random:
    """The source of everything random in one example."""
    return random.Random(f"{task}-{seed}-{length}-{index}")
