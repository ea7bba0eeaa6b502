"""Where the answers of a conversation come from: a model in this process, or a service."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from time import monotonic
from typing import Any

from evals.rest_client import RestClient
from services.cli.conversation import (
    STOPS,
    Figures,
    Kept,
    Message,
    Piece,
    as_messages,
    as_prompt,
)
from services.common.settings import Settings
from services.gateway.tools import ToolUse, answer_format
from winnow.answers import AnswerFormat
from winnow.answers.parts import Part, ReasoningPart, TextPart
from winnow.completion import CompletionStream
from winnow.local import Winnow
from winnow.sampling_params import SamplingParams


class LocalModel:
    """Answers of a model in this process, or of one of its adapters."""

    def __init__(
        self,
        winnow: Winnow,
        sampling: SamplingParams,
        settings: Settings,
        adapter: str | None = None,
    ) -> None:
        self.figures: Figures | None = None
        self._winnow = winnow
        self._sampling = sampling
        self._settings = settings
        self._adapter = adapter

    def answer(self, text: str, messages: list[Message]) -> Generator[Piece | None]:
        """While the prompt is computed, a sign of life after each layer."""
        self.figures = None
        started_s = monotonic()
        prompt, answer, stops = self._prompt(text, messages)
        parser = answer.parser()
        stream = yield from self._winnow.stream_by_layer(
            prompt,
            self._sampling,
            stops,
            shown_token_ids=answer.shown_token_ids,
            adapter=self._adapter,
        )
        figures, first_token_s = _figures_of(stream), None
        self.figures = figures
        with closing(iter(stream)) as pieces:
            for piece in pieces:
                seconds = monotonic() - started_s
                first_token_s = first_token_s or seconds
                self.figures = replace(
                    figures,
                    answer_tokens=len(stream.token_ids),
                    first_token_s=first_token_s,
                    seconds=seconds,
                )
                yield from _shown(parser.feed(piece))
        yield from _shown(parser.finish())

    def _prompt(
        self, text: str, messages: list[Message]
    ) -> tuple[str | list[int], AnswerFormat, tuple[str, ...]]:
        """The prompt, how reasoning is told from the answer, and where the answer ends."""
        tokenizer = self._winnow.tokenizer
        if not tokenizer.has_chat_template:
            return as_prompt(text, messages), AnswerFormat(), STOPS
        prompt = tokenizer.chat_text(as_messages(text, messages))
        found = answer_format(ToolUse(), prompt, self._settings, tokenizer, include_reasoning=None)
        return tokenizer.encode(prompt, add_special_tokens=False), found or AnswerFormat(), ()


def _shown(parts: Iterable[Part]) -> Sequence[Piece | None]:
    """The pieces in `parts`; a sign of life if there is none."""
    return [part for part in parts if isinstance(part, TextPart | ReasoningPart)] or [None]


def _figures_of(stream: CompletionStream) -> Figures:
    """Before the first token."""
    report = stream.report
    kept = Kept(
        report.selection_layer,
        report.num_selected_tokens,
        report.kv_bytes_kept,
        report.kv_bytes_full,
    )
    return Figures(report.num_prompt_tokens, report.num_cached_tokens, kept, 0, 0.0, 0.0)


class Service:
    """Answers of a service's model."""

    def __init__(self, client: RestClient, sampling: SamplingParams, settings: Settings) -> None:
        """settings: `model_name` (None: the service's first model), and what requests ask for:
        `pruning`, `chat_template_kwargs`.  Raises InvalidSetting.
        """
        self.figures: Figures | None = None
        self._client = client
        card = client.model_card(settings.model_name)
        self._body: dict[str, Any] = {
            "model": card["id"],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stream_options": {"include_usage": True},
        }
        if settings.pruning:
            self._body["winnow"] = dict(settings.pruning)
        template_kwargs = dict(settings.chat_template_kwargs or {})
        self._template = {"chat_template_kwargs": template_kwargs} if template_kwargs else {}
        self._has_chat = card.get("winnow", {}).get("chat", True)

    def answer(self, text: str, messages: list[Message]) -> Generator[Piece | None]:
        self.figures = None
        started_s = monotonic()
        first_token_s = 0.0
        with closing(self._events(text, messages)) as events:
            for event in events:
                piece = None if event is None else _piece_in(event)
                if piece is not None and not first_token_s:
                    first_token_s = monotonic() - started_s
                if event is not None and event.get("usage"):
                    seconds = monotonic() - started_s
                    self.figures = _figures_in(event["usage"], first_token_s or seconds, seconds)
                yield piece

    def _events(self, text: str, messages: list[Message]) -> Generator[dict[str, Any] | None]:
        if self._has_chat:
            body = {**self._body, **self._template, "messages": as_messages(text, messages)}
            return self._client.stream("/v1/chat/completions", body)
        body = {**self._body, "prompt": as_prompt(text, messages), "stop": list(STOPS)}
        return self._client.stream("/v1/completions", body)


def _piece_in(event: dict[str, Any]) -> Piece | None:
    for choice in event["choices"]:
        delta = choice.get("delta", {})
        if reasoning := delta.get("reasoning_content"):
            return ReasoningPart(reasoning)
        if text := choice.get("text", delta.get("content")):
            return TextPart(text)
    return None


def _figures_in(usage: dict[str, Any], first_token_s: float, seconds: float) -> Figures:
    """Other services than Winnow's do not tell what they kept."""
    winnow = usage.get("winnow")
    kept = None
    if winnow:
        kept = Kept(
            winnow["selection_layer"],
            winnow["selected_tokens"],
            winnow["kv_bytes_kept"],
            winnow["kv_bytes_full"],
        )
    return Figures(
        usage["prompt_tokens"],
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        kept,
        usage["completion_tokens"],
        first_token_s,
        seconds,
    )
