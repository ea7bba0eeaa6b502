"""A conversation about a text, and the figures of its answers."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from winnow.answers.parts import ReasoningPart, TextPart
from winnow.errors import WinnowError

Message = dict[str, str]
Piece: TypeAlias = TextPart | ReasoningPart


@dataclass(frozen=True, slots=True)
class Kept:
    """What pruning kept of a prompt."""

    selection_layer: int | None
    selected_tokens: int
    kv_bytes_kept: int
    kv_bytes_full: int

    def __str__(self) -> str:
        layer = "none" if self.selection_layer is None else f"{self.selection_layer}"
        kept, full = (num / 2**20 for num in (self.kv_bytes_kept, self.kv_bytes_full))
        return f"layer {layer}, {self.selected_tokens:,} went on; KV {kept:.1f} of {full:.1f} MiB"


@dataclass(frozen=True, slots=True)
class Figures:
    """What was done for one answer.

    kept: None if a service does not tell.  first_token_s: seconds from the question to the first
    text, of reasoning too.
    """

    prompt_tokens: int
    cached_tokens: int
    kept: Kept | None
    answer_tokens: int
    first_token_s: float
    seconds: float

    def __str__(self) -> str:
        return ", ".join(self._prompt()) + "; " + "; ".join(self._answer())

    def _prompt(self) -> list[str]:
        cached = [f"{self.cached_tokens:,} cached"] if self.cached_tokens else []
        return [f"{self.prompt_tokens:,} tokens", *cached]

    def _answer(self) -> list[str]:
        rest_s = self.seconds - self.first_token_s
        rate = (self.answer_tokens - 1) / rest_s if self.answer_tokens > 1 and rest_s > 0 else 0
        return [
            *([] if self.kept is None else [str(self.kept)]),
            f"first token {self.first_token_s:.2f} s, {rate:.0f} tokens/s",
        ]


class Answering(Protocol):
    """A source of answers.  figures: of the last one; None if it ended before they were known."""

    figures: Figures | None

    def answer(self, text: str, messages: list[Message]) -> Generator[Piece | None]:
        """Pieces of the answer to a conversation about `text`; None is a sign of life.

        Raises WinnowError if there is none.
        """
        ...


class Conversation:
    """Questions about `text`, and their answers so far."""

    def __init__(self, source: Answering, text: str, system: str | None = None) -> None:
        self._source = source
        self._text = text
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def figures(self) -> Figures | None:
        """Of the last answer; None if it was stopped before they were known."""
        return self._source.figures

    def ask(self, question: str) -> Generator[Piece | None]:
        """Pieces of the answer; one that is closed early stays in the conversation as it is.

        What the model reasons does not stay.
        Raises WinnowError if there is no answer; the conversation is then as it was before.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        said = ""
        try:
            with closing(self._source.answer(self._text, messages)) as answer:
                for piece in answer:
                    if isinstance(piece, TextPart):
                        said += piece.text
                    yield piece
        except WinnowError:
            said = ""
            raise
        finally:
            if said:
                self._messages = [*messages, {"role": "assistant", "content": said}]


def as_messages(text: str, messages: list[Message]) -> list[Message]:
    """The conversation with the text before its first question, so that all turns begin alike."""
    first = next(idx for idx, message in enumerate(messages) if message["role"] == "user")
    question = messages[first]["content"]
    told = {"role": "user", "content": f"{text}\n\n{question}"}
    return [*messages[:first], told, *messages[first + 1 :]]


def as_prompt(text: str, messages: list[Message]) -> str:
    """The conversation for a model without a chat template, which continues it."""
    turns = [_LABELS[message["role"]].format(message["content"]) for message in messages]
    return "\n".join([f"{text}\n", *turns, "Answer:"])


_LABELS = {"system": "{}", "user": "Question: {}", "assistant": "Answer: {}"}
STOPS = ("\nQuestion:",)  # where such a model begins to ask itself
