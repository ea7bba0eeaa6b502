"""Splitting a model's answer into text, reasoning, and calls of tools."""

from collections.abc import Iterable
from dataclasses import dataclass

from winnow.answers.formats.base import ToolFormat
from winnow.answers.frames import THINKING, Frame
from winnow.answers.json_calls import CallParser
from winnow.answers.parts import Part, ReasoningPart, Split, joined
from winnow.grammar.compose import Reasoning


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the text of one request's answers is split.

    tool_format: the form of calls; None if no tool may be called.  parallel: report more than one
    call.  frame: how reasoning is written.  reasoning: how an answer begins.
    shows_reasoning: report the reasoning, too.
    shown_token_ids: special tokens that are part of the text, because the format needs them.
    """

    tool_format: ToolFormat | None = None
    tool_names: frozenset[str] = frozenset()
    parallel: bool = True
    frame: Frame = THINKING
    reasoning: Reasoning = "none"
    shows_reasoning: bool = True
    shown_token_ids: frozenset[int] = frozenset()

    def parser(self) -> "AnswerParser":
        return AnswerParser(self)


class AnswerParser:
    """The parts of one answer, from its text as it comes."""

    def __init__(self, answer: AnswerFormat) -> None:
        self._shows_reasoning = answer.shows_reasoning
        self._splitter = answer.frame.splitter(answer.reasoning)
        self._calls: CallParser | None = None
        if answer.tool_format is not None:
            self._calls = CallParser(
                answer.tool_format.syntax,
                answer.tool_names,
                parallel=answer.parallel,
                new_id=answer.tool_format.new_id,
            )

    def feed(self, text: str) -> tuple[Part, ...]:
        """The parts that are certain after this text."""
        return joined(self._parts(self._splitter.feed(text)))

    def finish(self) -> tuple[Part, ...]:
        """The rest, once no more text will come."""
        parts = self._parts(self._splitter.finish())
        return joined([*parts, *(self._calls.finish() if self._calls else ())])

    @property
    def in_call(self) -> bool:
        """Whether the text so far ends within a call."""
        return self._calls is not None and self._calls.in_call

    def _parts(self, split: Iterable[Split]) -> list[Part]:
        parts: list[Part] = []
        for part in split:
            if isinstance(part, ReasoningPart):
                parts += [part] if self._shows_reasoning else []
            else:
                parts += [part] if self._calls is None else self._calls.feed(part.text)
        return parts
