"""The interface of tasks: examples with a prompt of about the requested length, and answers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from evals.templates import Template

# Number of tokens of a text in the model's tokenizer, without special tokens.
CountTokens = Callable[[str], int]
# (answer text, references) -> score, 0 to 1.
Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, in four parts, and its correct answers.

    depth: of the needle in the context, 0 (first) to 1; None if the task does not vary it.
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
        """For text completion: the benchmark's whole text, with the beginning of the answer."""
        return f"{self.opening}{self.context}{self.question}{self.lead}"

    def user_message(self) -> str:
        """For chat: without the beginning of the answer, which is not part of the user's turn."""
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
        """Make example `index`: a pure function of task, seed, length, index and tokenizer.

        Its prompt has at most `length` tokens, as counted by `count`.
        Raises InvalidSetting if no example of this task fits the length.
        """


@dataclass(frozen=True, slots=True)
class Question:
    """A template, the values of its fields, and the correct answers.

    preface: text before the template's opening.
    """

    template: Template
    fields: dict[str, str]
    answers: tuple[str, ...]
    depth: float | None = None
    preface: str = ""

    def around(self, task: Task, index: int, context: str) -> Example:
        """The example that asks this question about a context."""
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
    """The random generator of one example."""
    return random.Random(f"{task}-{seed}-{length}-{index}")
