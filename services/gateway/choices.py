"""The answers of one request while they are generated: tokens in, pieces of text out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.metrics import GatewayMetrics
from winnow.request import FinishReason, Token
from winnow.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added to choice `index`.

    text: whole characters, certainly before any stop string. tokens: the step's token, which may
    add no text yet. finish_reason: in the choice's last delta. prompt: the prompt's own tokens with
    their log-probabilities, in the choice's first delta, if they are wanted.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    prompt: tuple[Token, ...] = ()


class Choice:
    """One answer."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        echo: str,
        metrics: GatewayMetrics,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._text = TextStream(tokenizer, stop)
        self._echo = echo
        self._prompt: tuple[Token, ...] = ()
        self._metrics = metrics
        self._last_token_s: float | None = None

    def begin(self, prompt: tuple[Token, ...]) -> None:
        """Notes what the first delta tells of the prompt's own tokens."""
        self._prompt = prompt

    def end_at_once(self) -> Delta:
        """The only delta of an answer that may have no token."""
        self.finish_reason = FinishReason.LENGTH
        return self._delta("", ())

    def take(self, token: Token) -> Delta | None:
        """What the token adds; None for a token after the choice's end."""
        if self.finish_reason is not None:
            return None
        self._measure()
        self.num_tokens += 1
        # The end token itself is no part of the answer.
        ended = token.finish_reason is FinishReason.STOP
        text = "" if ended else self._text.feed(token.token_id)
        self.finish_reason = FinishReason.STOP if self._text.stopped else token.finish_reason
        if self.finish_reason is not None:
            text += self._text.finish()
        return self._delta(text, (token,))

    def _delta(self, text: str, tokens: tuple[Token, ...]) -> Delta:
        echo, self._echo = self._echo, ""
        prompt, self._prompt = self._prompt, ()
        return Delta(self.index, echo + text, tokens, self.finish_reason, prompt)

    def _measure(self) -> None:
        now_s = time.monotonic()
        if self._last_token_s is not None:
            self._metrics.inter_token.observe(now_s - self._last_token_s)
        self._last_token_s = now_s
