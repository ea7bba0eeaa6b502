"""Telling a model's reasoning, between <think> and </think>, from its answer."""

from collections.abc import Sequence

from winnow.answers.parts import ReasoningPart, Split, TextPart
from winnow.grammar.compose import Reasoning

THINK, END_THINK = "<think>", "</think>"
_MAX_END_CHARS = 32  # of a prompt: a tag and white space


class ReasoningSplitter:
    """Splits the text of one answer; the tags and the line breaks beside them are left out."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._state = reasoning
        self._held = ""  # it may be a tag, or line breaks beside one
        self._skips_breaks = reasoning == "open"

    def feed(self, text: str) -> Sequence[Split]:
        """What is certain after this text."""
        self._held += text
        reasoning = ""
        if self._state == "possible":
            self._begin()
        if self._state == "open":
            reasoning = self._reasoning()
        answer = self._answer() if self._state == "none" else ""
        return ReasoningPart(reasoning), TextPart(answer)

    def finish(self) -> Sequence[Split]:
        """The rest, once no more text will come."""
        held, self._held = self._held, ""
        return [ReasoningPart(held.rstrip("\n")) if self._state == "open" else TextPart(held)]

    def _begin(self) -> None:
        """Find out whether the answer begins with <think>."""
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._state, self._held = "open", begun[len(THINK) :]
            self._skips_breaks = True
        elif not THINK.startswith(begun):
            self._state = "none"

    def _reasoning(self) -> str:
        """The reasoning that is certain; ends it at its tag."""
        text, tag, rest = self._without_breaks().partition(END_THINK)
        if tag:
            self._state, self._held, self._skips_breaks = "none", rest, True
            return text.rstrip("\n")
        sure = text[: len(text) - _num_begun(text, END_THINK)].rstrip("\n")
        self._held = text[len(sure) :]
        return sure

    def _answer(self) -> str:
        text, self._held = self._without_breaks(), ""
        return text

    def _without_breaks(self) -> str:
        """What is held, without the line breaks after a tag."""
        text = self._held.lstrip("\n") if self._skips_breaks else self._held
        self._skips_breaks = self._skips_breaks and not text
        return text


def _num_begun(text: str, tag: str) -> int:
    """Number of characters at the end of the text with which the tag may begin."""
    return next(n for n in range(len(tag) - 1, -1, -1) if text.endswith(tag[:n]))


def reasoning_after(prompt: str) -> Reasoning:
    """How the answer to a prompt begins that may end with a tag."""
    end = prompt[-_MAX_END_CHARS:].rstrip()
    if end.endswith(THINK):
        return "open"
    return "none" if end.endswith(END_THINK) else "possible"
