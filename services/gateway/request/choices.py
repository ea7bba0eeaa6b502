"""The choices of one request while they are generated: tokens in, deltas of text out."""

import time
from dataclasses import dataclass, replace
from typing import Literal

from services.gateway.metrics import GatewayMetrics
from winnow.answers import AnswerFormat, AnswerParser
from winnow.answers.parts import CallStart, Part, TextPart, joined
from winnow.sampling_params import SamplingParams
from winnow.text_stream import TextStream
from winnow.tokens import FinishReason, Token


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added to choice `index`.

    text: complete characters that cannot become part of a stop string. parts: what that text is
    known to be; calls_tools: whether the choice has called a tool so far, and each call is whole.
    tokens: the step's token, which may not add text yet. finish_reason, stop_reason: in the
    choice's last delta, the latter being the request's stop token or stop string if one of them
    ended it. prompt: the prompt's tokens with log-probabilities, in the choice's first delta, if
    requested.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt: tuple[Token, ...] = ()
    parts: tuple[Part, ...] = ()
    calls_tools: bool = False

    @property
    def told_finish_reason(self) -> Literal["stop", "length", "tool_calls"] | None:
        """The finish reason as OpenAI's API names it."""
        if self.calls_tools and self.finish_reason is FinishReason.STOP:
            return "tool_calls"
        return None if self.finish_reason is None else self.finish_reason.value


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The tokens that end an answer: the model's own, and those added by the request.

    Decode ends a sequence at any of them; a worker of an older release knows only the model's.
    """

    own: frozenset[int]
    added: frozenset[int]

    @classmethod
    def of(cls, sampling: SamplingParams, eos_token_ids: frozenset[int]) -> "EndTokens":
        own = frozenset() if sampling.ignore_eos else eos_token_ids
        return cls(own, sampling.stop_token_ids - own)

    def end_at(self, token: Token) -> bool:
        """Whether the answer ends with this token."""
        is_end = token.token_id in self.own or token.token_id in self.added
        return is_end or token.finish_reason is FinishReason.STOP


class Choice:
    """One choice (answer) of a request.

    num_logprobs: what the client asked for, as in SamplingParams; decode may return more.
    answer: how the text is split into parts.
    """

    def __init__(
        self,
        index: int,
        text: TextStream,
        echo: str,
        end_tokens: EndTokens,
        num_logprobs: int | None,
        metrics: GatewayMetrics,
        answer: AnswerFormat | None = None,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._text = text
        self._echo = echo
        self._prompt: tuple[Token, ...] = ()
        self._end_tokens = end_tokens
        self._num_logprobs = num_logprobs
        self._metrics = metrics
        self._last_token_s: float | None = None
        self._parser: AnswerParser | None = None if answer is None else answer.parser()
        self._calls_tools = False

    def begin(self, prompt: tuple[Token, ...]) -> None:
        """Set the prompt's tokens for the first delta."""
        self._prompt = prompt

    def end_at_once(self) -> Delta:
        """The only delta of a choice that generates no token (max_tokens 0)."""
        self.finish_reason = FinishReason.LENGTH
        return self._delta("", ())

    def take(self, token: Token) -> Delta | None:
        """The delta for one more token; None for a token after the choice's end."""
        if self.finish_reason is not None:
            return None
        self._measure()
        self.num_tokens += 1
        is_end = self._end_tokens.end_at(token)
        text = self._text.feed(token.token_id, is_end=is_end)
        stopped = is_end or self._text.stopped
        self.finish_reason = FinishReason.STOP if stopped else token.finish_reason
        if self.finish_reason is not None:
            text += self._text.finish()
        return self._delta(text, (self._shown(token),))

    def _shown(self, token: Token) -> Token:
        logprobs, num_shown = token.logprobs, self._num_logprobs
        if logprobs is None:
            return token
        if num_shown is None:
            return replace(token, logprobs=None)
        return replace(token, logprobs=replace(logprobs, top=logprobs.top[:num_shown]))

    def _delta(self, text: str, tokens: tuple[Token, ...]) -> Delta:
        echo, self._echo = self._echo, ""
        prompt, self._prompt = self._prompt, ()
        reason = self._stop_reason(tokens[-1]) if tokens else None
        parts = joined((TextPart(echo), *self._parts(text)))
        self._calls_tools |= any(isinstance(part, CallStart) for part in parts)
        return Delta(
            self.index,
            echo + text,
            tokens,
            self.finish_reason,
            reason,
            prompt,
            parts,
            self._calls_tools and not (self._parser and self._parser.in_call),
        )

    def _parts(self, text: str) -> tuple[Part, ...]:
        if self._parser is None:
            return (TextPart(text),) if text else ()
        parts = self._parser.feed(text)
        return parts if self.finish_reason is None else joined((*parts, *self._parser.finish()))

    def _stop_reason(self, last: Token) -> int | str | None:
        if self.finish_reason is not FinishReason.STOP:
            return None
        if self._text.stop_string is not None:
            return self._text.stop_string
        return last.token_id if last.token_id in self._end_tokens.added else None

    def _measure(self) -> None:
        now_s = time.monotonic()
        if self._last_token_s is not None:
            self._metrics.inter_token.observe(now_s - self._last_token_s)
        self._last_token_s = now_s
