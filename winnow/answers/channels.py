"""Telling reasoning, calls and text apart in an answer of messages, each in a channel.

gpt-oss writes so; OpenAI calls the form Harmony. A message is a header, which names the channel and
perhaps a function to call, <|message|>, and text. The prompt has begun the first one's header.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

from winnow.answers.parts import ReasoningPart, Split, TextPart
from winnow.grammar.compose import Reasoning

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
ROLE, ANALYSIS, FINAL = "assistant", "analysis", "final"
FINAL_HEADER = f"{CHANNEL}{FINAL}{MESSAGE}"
CALLED_IN = "commentary to=functions."  # the channel of calls, up to a function's name

_ENDS = (END, CALL, RETURN, START, CHANNEL)  # of a message; the last two begin another header
_END = re.compile("|".join(map(re.escape, _ENDS)))
_HEADS = (START, CHANNEL, MESSAGE, "to=")
_MAX_HEADER_CHARS = 256
_FUNCTION = re.compile(r"\bto=functions\.([\w.-]+)", re.ASCII)
_REASONS = re.compile(re.escape(CHANNEL) + rf"\s*{ANALYSIS}\b")
_GAP = "\n\n"  # between two messages of one kind

_Message = Literal["reasoning", "text", "call"]
_MESSAGES: dict[Reasoning, _Message | None] = {
    "none": "text",
    "possible": None,
    "open": "reasoning",
}


def call_header(name: str) -> str:
    """What a call has before its arguments."""
    return f"{CHANNEL}{CALLED_IN}{name} {CONSTRAIN}json{MESSAGE}"


class ChannelSplitter:
    """Splits the text of one answer.

    Headers are left out, but a call is text that begins with its `call_header`, however the model
    wrote that. Text without a header is for the user.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self._message = _MESSAGES[reasoning]  # what it is; None in a header
        self._has_text = True  # some of the message's text is told, or is in the prompt
        self._told: set[_Message] = set()
        self._held = ""  # it may be a header, or end a message

    @property
    def state(self) -> Reasoning:
        """As an answer begins that goes on from here."""
        return next((one for one, kind in _MESSAGES.items() if kind == self._message), "none")

    def feed(self, text: str) -> Sequence[Split]:
        """What is certain after this text."""
        self._held += text
        return [*self._read()]

    def finish(self) -> Sequence[Split]:
        """The rest, once no more text will come. A header that is cut off is no text."""
        held, self._held = self._held, ""
        if self._message is None:
            if _END.search(held):
                return []
            self._begin("text")
        return [*self._text(held)]

    def _read(self) -> Iterator[Split]:
        while self._message is not None or (yield from self._header()):
            end = _END.search(self._held)
            if end is None:
                yield from self._text(self._taken(self._num_sure()))
                return
            yield from self._text(self._taken(end.start()))
            if end[0] not in (START, CHANNEL):
                self._taken(len(end[0]))
            self._message = None

    def _header(self) -> Generator[Split, None, bool]:
        """Read a header; returns whether its message has begun."""
        begun = self._held.lstrip()
        if not any(one.startswith(begun) or begun.startswith(one) for one in _HEADS):
            self._begin("text")
            return True
        header, mark, _ = begun[:_MAX_HEADER_CHARS].partition(MESSAGE)
        num_chars = len(self._held) - len(begun) + len(header + mark)
        if mark:
            self._taken(num_chars)
            header = header.rpartition(START)[2]  # what is before is none
            called = _FUNCTION.search(header)
            if called is not None:
                self._begin("call")
                yield TextPart(call_header(called[1]))
            else:
                self._begin("reasoning" if _REASONS.search(header) else "text")
        elif len(header) == _MAX_HEADER_CHARS:
            self._begin("text")
            yield from self._text(self._taken(num_chars))
        return self._message is not None

    def _begin(self, message: _Message) -> None:
        self._message = message
        self._has_text = False

    def _text(self, text: str) -> Iterator[Split]:
        """Tell some of the message's text."""
        if not text or self._message is None:
            return
        part = ReasoningPart if self._message == "reasoning" else TextPart
        if not self._has_text and self._message in self._told:
            yield part(_GAP)
        self._has_text = True
        if self._message != "call":
            self._told.add(self._message)
        yield part(text)

    def _taken(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken

    def _num_sure(self) -> int:
        """Number of characters held that do not begin what ends a message."""
        at = self._held.rfind("<")
        may_end = at >= 0 and any(end.startswith(self._held[at:]) for end in _ENDS)
        return at if may_end else len(self._held)


def channel_after(prompt: str) -> Reasoning:
    """How the answer to a prompt begins, by the message that the prompt ends with."""
    splitter = ChannelSplitter("possible")
    _, start, message = prompt.rpartition(START)
    splitter.feed(start and start + message)
    return splitter.state
