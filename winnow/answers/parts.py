"""The parts of an answer, as they are streamed."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """What the model reasons before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the tool `name` begins; `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments: together JSON text, unless the model writes something else."""

    index: int
    text: str


Split = TextPart | ReasoningPart
Part = Split | CallStart | CallArguments


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts with neighbours of one kind made one, and without empty ones."""
    done: list[Part] = []
    for part in parts:
        last = done[-1] if done else None
        if isinstance(part, CallStart):
            done.append(part)
        elif isinstance(part, CallArguments):
            if isinstance(last, CallArguments) and last.index == part.index:
                done[-1] = CallArguments(part.index, last.text + part.text)
            elif part.text:
                done.append(part)
        elif isinstance(last, type(part)):
            done[-1] = type(part)(last.text + part.text)
        elif part.text:
            done.append(part)
    return tuple(done)
