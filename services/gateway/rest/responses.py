"""Responses in the format of OpenAI's API: chunks of a stream, or one object."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

from services.gateway.logprobs import CompletionLogprobs, chat_logprobs
from services.gateway.request.choices import Delta
from services.gateway.rest.requests import OpenAIRequest
from services.gateway.usage import RequestUsage, token_counts
from winnow.tokenizer import Tokenizer
from winnow.tokens import Token


class ResponseFormatter(ABC):
    """Converts one request's deltas to JSON objects; counts the tokens streamed per choice."""

    def __init__(self, request: OpenAIRequest, model_name: str, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._num_tokens: Counter[int] = Counter()
        self._head = {
            "id": request.generation.request_id,
            "created": int(time.time()),
            "model": model_name,
        }

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk for `delta`; None if it would be empty for the client."""
        self._num_tokens[delta.index] += len(delta.tokens)
        if not (delta.text or delta.finish_reason or self._request.top_logprobs is not None):
            return None
        chunk = self._chunk_of(delta)
        if self._request.include_usage:
            chunk["usage"] = self._usage_so_far(delta) if self._request.continuous_usage else None
        return chunk

    def _usage_so_far(self, delta: Delta) -> dict[str, int]:
        """Usage of the delta's choice so far, counted as in vLLM."""
        generation = self._request.generation
        num_prompt_tokens = len(generation.prompts[delta.index // generation.num_choices].token_ids)
        return token_counts(num_prompt_tokens, self._num_tokens[delta.index])

    @abstractmethod
    def _chunk_of(self, delta: Delta) -> dict[str, Any]:
        """`chunk` without the usage."""

    @abstractmethod
    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        """The whole response in one object, from all deltas."""

    @abstractmethod
    def usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
        """The last chunk with stream_options.include_usage, which has no choices."""

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
            )
            for index, own in enumerate(parts)
        ]


def _end(delta: Delta) -> dict[str, Any]:
    return {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}


class CompletionFormatter(ResponseFormatter):
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

    def _chunk_of(self, delta: Delta) -> dict[str, Any]:
        return self._chunk(self._KIND, [self._choice(delta)])

    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        choices = [self._choice(delta) for delta in self._by_choice(deltas)]
        return self._whole(self._KIND, choices, usage)

    def usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
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


class ChatFormatter(ResponseFormatter):
    """Format of /v1/chat/completions."""

    def __init__(self, request: OpenAIRequest, model_name: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model_name, tokenizer)
        self._begun: set[int] = set()

    def _chunk_of(self, delta: Delta) -> dict[str, Any]:
        """The first chunk of each choice has the role."""
        role = {} if delta.index in self._begun else {"role": "assistant"}
        self._begun.add(delta.index)
        choice = {
            "index": delta.index,
            "delta": {**role, "content": delta.text},
            "logprobs": self._logprobs(delta.tokens),
            **_end(delta),
        }
        return self._chunk("chat.completion.chunk", [choice])

    def whole(self, deltas: list[Delta], usage: RequestUsage) -> dict[str, Any]:
        choices = [
            {
                "index": delta.index,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._logprobs(delta.tokens),
                **_end(delta),
            }
            for delta in self._by_choice(deltas)
        ]
        return self._whole("chat.completion", choices, usage)

    def usage_chunk(self, usage: RequestUsage) -> dict[str, Any]:
        return self._whole("chat.completion.chunk", [], usage)

    def _logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        if self._request.top_logprobs is None:
            return None
        return chat_logprobs(self._tokenizer, tokens)
