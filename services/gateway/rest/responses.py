"""Responses in the format of OpenAI's API: chunks of a stream, or one object."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

from services.gateway.logprobs import CompletionLogprobs, chat_logprobs
from services.gateway.request.choices import Delta
from services.gateway.rest.errors import error_object
from services.gateway.rest.requests import OpenAIRequest
from services.gateway.usage import RequestUsage, token_counts
from winnow.answers.parts import CallArguments, CallStart, Part, ReasoningPart, TextPart, joined
from winnow.errors import WinnowError
from winnow.tokenizer import Tokenizer
from winnow.tokens import Token


@dataclass(frozen=True, slots=True)
class Event:
    """A server-sent event: its data as JSON, and its `event:` line if it has one."""

    data: dict[str, Any]
    name: str | None = None


class ResponseFormatter(ABC):
    """Converts one request's deltas to the events of a stream, or to one object.

    done: the stream's last line of data after all events; None if it has none.  repeats_request:
    whether its first and last events, and failures, hold what the client has sent, which may be
    much.
    """

    done: str | None = "[DONE]"
    repeats_request = False

    def begin(self) -> list[Event]:
        """The events that are sent with the headers."""
        return []

    @abstractmethod
    def events(self, delta: Delta) -> list[Event]:
        """The events for `delta`; none if they would be empty for the client."""

    @abstractmethod
    def end(self, usage: RequestUsage) -> list[Event]:
        """The events after the last delta."""

    @abstractmethod
    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        """The whole response in one object, from all deltas."""

    @abstractmethod
    def failure(self, error: WinnowError) -> Event:
        """The last event of a stream that fails after it has begun."""


class OpenAIFormatter(ResponseFormatter):
    """Converts deltas to chunks of OpenAI's API; counts the tokens streamed per choice."""

    def __init__(self, request: OpenAIRequest, model_name: str, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._num_tokens: Counter[int] = Counter()
        self._head = {
            "id": request.generation.request_id,
            "created": int(time.time()),
            "model": model_name,
        }

    def events(self, delta: Delta) -> list[Event]:
        self._num_tokens[delta.index] += len(delta.tokens)
        usage: dict[str, Any] = {}
        if self._request.include_usage:
            usage["usage"] = self._usage_so_far(delta) if self._request.continuous_usage else None
        return [Event({**chunk, **usage}) for chunk in self._chunks_of(delta)]

    def end(self, usage: RequestUsage) -> list[Event]:
        """With stream_options.include_usage a last chunk, which has no choices."""
        return [Event(self._usage_chunk(usage))] if self._request.include_usage else []

    def failure(self, error: WinnowError) -> Event:
        return Event(error_object(error))

    def _usage_so_far(self, delta: Delta) -> dict[str, int]:
        """Usage of the delta's choice so far, counted as in vLLM."""
        generation = self._request.generation
        num_prompt_tokens = len(generation.prompts[delta.index // generation.num_choices].token_ids)
        return token_counts(num_prompt_tokens, self._num_tokens[delta.index])

    def _is_empty(self, delta: Delta) -> bool:
        """Whether the client need not hear of a delta without text."""
        return delta.finish_reason is None and self._request.top_logprobs is None

    @abstractmethod
    def _chunks_of(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks for `delta`, without the usage."""

    @abstractmethod
    def _usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
        """The chunk that has the usage and no choices."""

    def _chunk(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _whole(
        self, kind: str, choices: list[dict[str, Any]], usage: RequestUsage
    ) -> dict[str, Any]:
        return {**self._chunk(kind, choices), "usage": usage.to_json()}

    def _by_choice(self, deltas: list[Delta]) -> list[Delta]:
        """One delta per choice, joined from all of its deltas, by index."""
        generation = self._request.generation
        parts: list[list[Delta]] = [
            [] for _ in range(len(generation.prompts) * generation.num_choices)
        ]
        for delta in deltas:
            parts[delta.index].append(delta)
        return [
            Delta(
                index,
                "".join(delta.text for delta in own),
                tuple(token for delta in own for token in delta.tokens),
                own[-1].finish_reason,
                own[-1].stop_reason,
                own[0].prompt,
                joined(part for delta in own for part in delta.parts),
                own[-1].calls_tools,
            )
            for index, own in enumerate(parts)
        ]


_NO_END = {"logprobs": None, "finish_reason": None, "stop_reason": None}


def _end(delta: Delta) -> dict[str, Any]:
    return {"finish_reason": delta.told_finish_reason, "stop_reason": delta.stop_reason}


class CompletionFormatter(OpenAIFormatter):
    """Format of /v1/completions."""

    _KIND = "text_completion"

    def __init__(self, request: OpenAIRequest, model_name: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model_name, tokenizer)
        self._logprobs = [
            CompletionLogprobs(
                tokenizer,
                prompt.echo,
                prompt.offsets,
                skip_special_tokens=request.generation.skip_special_tokens,
            )
            for prompt in request.generation.prompts
            for _ in range(request.generation.num_choices)
        ]

    def _chunks_of(self, delta: Delta) -> list[dict[str, Any]]:
        if not delta.text and self._is_empty(delta):
            return []
        return [self._chunk(self._KIND, [self._choice(delta)])]

    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        choices = [self._choice(delta) for delta in self._by_choice(deltas)]
        return self._whole(self._KIND, choices, usage)

    def _usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
        return self._whole(self._KIND, [], usage)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self._request.top_logprobs is not None:
            logprobs = self._logprobs[delta.index].take(delta.prompt, delta.tokens)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            **_end(delta),
        }


class ChatFormatter(OpenAIFormatter):
    """Format of /v1/chat/completions."""

    def __init__(self, request: OpenAIRequest, model_name: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model_name, tokenizer)
        self._begun: set[int] = set()

    def _chunks_of(self, delta: Delta) -> list[dict[str, Any]]:
        """A chunk for each part; the first one of a choice has the role, the last one the rest.

        The first one comes with the first token, since clients want choices to begin in order.
        """
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        told = [_told(part) for part in delta.parts]
        if not told:
            if self._is_empty(delta) and not is_first:
                return []
            told = [{"content": ""} if self._request.generation.answer is None else {}]
        if is_first:
            told[0] = {"role": "assistant", **told[0]}
        choices = [{"index": delta.index, "delta": one, **_NO_END} for one in told]
        choices[-1] |= {"logprobs": self._logprobs(delta.tokens), **_end(delta)}
        return [self._chunk("chat.completion.chunk", [choice]) for choice in choices]

    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        answer = self._request.generation.answer
        must_call = answer is not None and answer.must_call
        choices = [
            {
                "index": delta.index,
                "message": _message(delta, must_call=must_call),
                "logprobs": self._logprobs(delta.tokens),
                **_end(delta),
            }
            for delta in self._by_choice(deltas)
        ]
        return self._whole("chat.completion", choices, usage)

    def _usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
        return self._whole("chat.completion.chunk", [], usage)

    def _logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        if self._request.top_logprobs is None:
            return None
        return chat_logprobs(self._tokenizer, tokens)


def _told(part: Part) -> dict[str, Any]:
    """A part as the delta of a chunk. A call's id and name come once, with empty arguments."""
    match part:
        case TextPart(text):
            return {"content": text}
        case ReasoningPart(text):
            return {"reasoning_content": text}
        case CallStart(index):
            return {"tool_calls": [{"index": index, **_tool_call(part, "")}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(delta: Delta, *, must_call: bool) -> dict[str, Any]:
    """The message of a whole answer. Reasoning and calls are there only if it has some."""
    text = "".join(part.text for part in delta.parts if isinstance(part, TextPart))
    reasoning = "".join(part.text for part in delta.parts if isinstance(part, ReasoningPart))
    arguments: dict[int, str] = {
        part.index: part.text for part in delta.parts if isinstance(part, CallArguments)
    }
    calls = [
        _tool_call(part, arguments.get(part.index, ""))
        for part in delta.parts
        if isinstance(part, CallStart)
    ]
    return {
        "role": "assistant",
        "content": None if (calls or must_call) and not text else text,
        "refusal": None,
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _tool_call(call: CallStart, arguments: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
