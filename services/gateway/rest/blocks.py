"""An answer as a sequence of blocks: text, reasoning, calls of tools."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from services.gateway.request.choices import Delta
from services.gateway.rest.requests import OpenAIRequest
from services.gateway.rest.responses import Event, ResponseFormatter
from services.gateway.usage import RequestUsage
from winnow.answers.parts import CallArguments, CallStart, Part, ReasoningPart, TextPart
from winnow.tokens import FinishReason

Kind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    """call: of the tool, if it is a call; then the text is the arguments' JSON.

    is_open: more text may come.  is_complete: false if the answer was cut off in it.
    """

    index: int
    kind: Kind
    id: str
    call: CallStart | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    is_open: bool = True
    is_complete: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class BlockFormatter(ResponseFormatter):
    """For APIs whose answers are one list of blocks, which are streamed one after the other.

    White space alone makes no block, except as a whole answer.
    """

    done = None

    def __init__(self, request: OpenAIRequest) -> None:
        self._request = request
        self._blocks: list[Block] = []
        self._space = ""  # white space that waits for the text it may begin
        self._last: Delta | None = None
        self._num_reasoning_tokens = 0

    def events(self, delta: Delta) -> list[Event]:
        events = [event for part in delta.parts for event in self._take(part)]
        if self._blocks and self._blocks[-1].kind == "reasoning":
            self._num_reasoning_tokens += len(delta.tokens)
        if delta.finish_reason is not None:
            self._last = delta
            events += self._finish(is_complete=delta.finish_reason is FinishReason.STOP)
        return events

    def end(self, usage: RequestUsage) -> list[Event]:
        return self._ended(self._object(usage))

    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        for delta in deltas:
            self.events(delta)
        return self._object(usage)

    @abstractmethod
    def _object(self, usage: RequestUsage) -> dict[str, Any]:
        """The whole response."""

    @abstractmethod
    def _ended(self, whole: dict[str, Any]) -> list[Event]:
        """The events after the last block."""

    @abstractmethod
    def _block_id(self, kind: Kind) -> str:
        """A new id of a block; empty if the API has none."""

    @abstractmethod
    def _opened(self, block: Block) -> list[Event]:
        """The events of a block that begins."""

    @abstractmethod
    def _grown(self, block: Block, text: str) -> list[Event]:
        """The events of more text."""

    @abstractmethod
    def _closed(self, block: Block) -> list[Event]:
        """The events of a block that has ended."""

    def _take(self, part: Part) -> list[Event]:
        match part:
            case CallStart():
                return self._open("call", part)
            case CallArguments():
                return self._grow(part.text)
            case ReasoningPart():
                return self._continue("reasoning", part.text)
            case TextPart():
                return self._continue("text", part.text)

    def _continue(self, kind: Kind, text: str) -> list[Event]:
        """Add to the open block if it is of this kind, else begin another."""
        if self._blocks and self._blocks[-1].is_open and self._blocks[-1].kind == kind:
            return self._grow(text)
        self._space += text
        if self._space.isspace() or not self._space:
            return []
        return self._open_with(kind, self._space)

    def _open_with(self, kind: Kind, text: str) -> list[Event]:
        return [*self._open(kind), *self._grow(text)]

    def _open(self, kind: Kind, call: CallStart | None = None) -> list[Event]:
        events = self._close(is_complete=True)
        self._space = ""
        index = len(self._blocks)
        self._blocks.append(Block(index, kind, self._block_id(kind), call))
        return [*events, *self._opened(self._blocks[-1])]

    def _grow(self, text: str) -> list[Event]:
        if not text:
            return []
        block = self._blocks[-1]
        block.pieces.append(text)
        return self._grown(block, text)

    def _close(self, *, is_complete: bool) -> list[Event]:
        if not self._blocks or not self._blocks[-1].is_open:
            return []
        block = self._blocks[-1]
        # A call without arguments has an empty object of them.
        events = self._grow("{}") if block.call and is_complete and not block.pieces else []
        block.is_open, block.is_complete = False, is_complete
        return [*events, *self._closed(block)]

    def _finish(self, *, is_complete: bool) -> list[Event]:
        only_space = [] if self._blocks else self._open_with("text", self._space)
        return [*only_space, *self._close(is_complete=is_complete)]

    @property
    def _was_cut(self) -> bool:
        return self._last is not None and self._last.finish_reason is FinishReason.LENGTH
