"""The plan of an evaluation, parsed and validated before anything is loaded."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evals.records import Key
from evals.summary import Setup
from evals.tasks.base import Task
from evals.variants import Variant, parse_list
from winnow.errors import InvalidSetting

_LENGTH = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every task at every length under every variant, `num_samples` times.

    lengths: limits on prompt tokens.  chat: prompts are rendered with the chat template.
    depths, data_dir: the arguments that the tasks were made with.
    first_index: of the samples.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    variants: tuple[Variant, ...]
    num_samples: int
    seed: int
    chat: bool
    depths: int
    data_dir: Path | None
    first_index: int = 0

    def __post_init__(self) -> None:
        for name, value in (("samples", self.num_samples), ("depths", self.depths)):
            if value < 1:
                raise InvalidSetting(f"--{name} is {value}; it must be at least 1", param=name)

    @property
    def indices(self) -> range:
        return range(self.first_index, self.first_index + self.num_samples)

    def keys(self) -> set[Key]:
        """One for each answer that is asked for."""
        return {
            key_of(task, length, index, variant)
            for index, length, task in self.places()
            for variant in self.variants
        }

    def places(self) -> Iterator[tuple[int, int, Task]]:
        """Yield (index, length, task): all tasks at all lengths before the next sample of any.

        So a run that is interrupted has covered all of them evenly.
        """
        for index in self.indices:
            for length in self.lengths:
                for task in self.tasks:
                    yield index, length, task

    def setups(self) -> list[Setup]:
        return [
            Setup(length, variant.method, variant.budget)
            for length in self.lengths
            for variant in self.variants
        ]

    def to_json(self) -> dict[str, Any]:
        """The settings that a resumed run must share with this one."""
        return {
            "tasks": [task.name for task in self.tasks],
            "lengths": list(self.lengths),
            "methods": list(dict.fromkeys(variant.method for variant in self.variants)),
            "budgets": sorted({v.budget for v in self.variants if v.budget is not None}),
            "samples": self.num_samples,
            "seed": self.seed,
            "chat": self.chat,
            "depths": self.depths,
            "data_dir": None if self.data_dir is None else str(self.data_dir),
        }


def key_of(task: Task, length: int, index: int, variant: Variant) -> Key:
    """The key of the record that an answer leaves."""
    return (task.name, length, index, variant.method, variant.budget)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse lengths like `1k,2048`, ascending; k is 1,024 tokens.  Raises InvalidSetting."""
    return tuple(sorted({_parse_length(part) for part in parse_list("length", text)}))


def _parse_length(text: str) -> int:
    found = _LENGTH.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise InvalidSetting(
            f"--length {text!r} is not a number of tokens like 2048 or 2k", param="length"
        )
    return int(found[1]) * (1024 if found[2] else 1)


def parse_budgets(text: str) -> tuple[int, ...]:
    """Parse budgets like `64,128`, ascending.  Raises InvalidSetting."""
    parts = parse_list("budget", text)
    wrong = [part for part in parts if not part.isdecimal() or int(part) == 0]
    if wrong:
        raise InvalidSetting(f"--budget {wrong[0]!r} is not a number of tokens", param="budget")
    return tuple(sorted({int(part) for part in parts}))


def choose_tasks(text: str, known: Sequence[Task]) -> tuple[Task, ...]:
    """Select tasks by name, group, or pattern like `chain_*`, in the order of `known`.

    Raises InvalidSetting, listing what is known, for a pattern that matches nothing.
    """
    patterns = parse_list("tasks", text)
    for pattern in patterns:
        if not any(_matches(pattern, task) for task in known):
            groups = dict.fromkeys(task.group for task in known)
            names = (task.name for task in known)
            raise InvalidSetting(
                f"task {pattern!r} is not known; known are the groups {', '.join(groups)} "
                f"and the tasks {', '.join(names)}",
                param="tasks",
            )
    return tuple(task for task in known if any(_matches(p, task) for p in patterns))


def _matches(pattern: str, task: Task) -> bool:
    return pattern == task.group or fnmatchcase(task.name, pattern)
