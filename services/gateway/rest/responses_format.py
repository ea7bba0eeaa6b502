"""Format of /v1/responses: events of a stream, or one response object."""

import secrets
import time
from typing import Any

from services.gateway.logprobs import chat_logprobs
from services.gateway.request.choices import Delta
from services.gateway.rest.blocks import Block, BlockFormatter, Kind
from services.gateway.rest.requests import OpenAIRequest
from services.gateway.rest.responses import Event
from services.gateway.rest.responses_bodies import ResponsesRequest
from services.gateway.usage import RequestUsage
from winnow.errors import WinnowError, status_of
from winnow.tokenizer import Tokenizer
from winnow.tokens import Token

_ITEM_IDS = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}
_EVENT_KINDS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
# What OpenAI's clients know as `error.code` of a response, by HTTP status.
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponsesFormatter(BlockFormatter):
    """Format of /v1/responses.  asked: the request's body, which the response repeats."""

    repeats_request = True

    def __init__(
        self, request: OpenAIRequest, asked: ResponsesRequest, tokenizer: Tokenizer
    ) -> None:
        super().__init__(request)
        self._asked = asked
        self._tokenizer = tokenizer
        self._created_s = int(time.time())
        self._num_events = 0
        self._unlisted: list[Token] = []  # tokens whose text is not there yet

    def begin(self) -> list[Event]:
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def events(self, delta: Delta) -> list[Event]:
        self._unlisted += delta.tokens
        return super().events(delta)

    def failure(self, error: WinnowError) -> Event:
        code = _ERROR_CODES.get(status_of(error).http, "server_error")
        told = {"code": code, "message": error.message, "type": error.code, "param": error.param}
        return self._event("response.failed", response=self._response("failed", error=told))

    def _ended(self, whole: dict[str, Any]) -> list[Event]:
        return [self._event(f"response.{whole['status']}", response=whole)]

    def _object(self, usage: RequestUsage) -> dict[str, Any]:
        cut = {"incomplete_details": {"reason": "max_output_tokens"}} if self._was_cut else {}
        status = "incomplete" if self._was_cut else "completed"
        return self._response(status, usage=self._usage(usage), **cut)

    def _opened(self, block: Block) -> list[Event]:
        item = self._event(
            "response.output_item.added",
            output_index=block.index,
            item=_item(block, "in_progress"),
        )
        if block.kind == "call":
            return [item]
        return [item, self._part_event("response.content_part.added", block, part=_part(block))]

    def _grown(self, block: Block, text: str) -> list[Event]:
        name = f"{_EVENT_KINDS[block.kind]}.delta"
        unlisted, self._unlisted = self._unlisted, []
        if block.kind == "call":
            return [self._item_event(name, block, delta=text)]
        if block.kind == "reasoning":
            return [self._part_event(name, block, delta=text)]
        logprobs = self._logprobs(unlisted)
        block.logprobs += logprobs
        return [self._part_event(name, block, delta=text, logprobs=logprobs)]

    def _closed(self, block: Block) -> list[Event]:
        status = "completed" if block.is_complete else "incomplete"
        name = f"{_EVENT_KINDS[block.kind]}.done"
        if block.kind == "call":
            assert block.call is not None
            told = {"name": block.call.name, "arguments": block.text}
            events = [self._item_event(name, block, **told)]
        else:
            logprobs = {"logprobs": block.logprobs} if block.kind == "text" else {}
            events = [
                self._part_event(name, block, text=block.text, **logprobs),
                self._part_event("response.content_part.done", block, part=_part(block)),
            ]
        done = {"output_index": block.index, "item": _item(block, status)}
        return [*events, self._event("response.output_item.done", **done)]

    def _block_id(self, kind: Kind) -> str:
        return _ITEM_IDS[kind] + secrets.token_hex(16)

    def _event(self, name: str, /, **fields: Any) -> Event:  # noqa: ANN401 - an event's, in JSON
        number = self._num_events
        self._num_events += 1
        return Event({"type": name, "sequence_number": number, **fields}, name)

    def _item_event(self, name: str, block: Block, /, **fields: Any) -> Event:  # noqa: ANN401
        return self._event(name, item_id=block.id, output_index=block.index, **fields)

    def _part_event(self, name: str, block: Block, /, **fields: Any) -> Event:  # noqa: ANN401
        return self._item_event(name, block, content_index=0, **fields)

    def _logprobs(self, tokens: list[Token]) -> list[dict[str, Any]]:
        if self._request.top_logprobs is None:
            return []
        listed: list[dict[str, Any]] = chat_logprobs(self._tokenizer, tokens)["content"]
        return listed

    def _usage(self, usage: RequestUsage) -> dict[str, Any]:
        told = usage.to_json()
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": told["total_tokens"],
            "winnow": told["winnow"],
        }

    def _response(self, status: str, **known: Any) -> dict[str, Any]:  # noqa: ANN401
        """The response object.  known: fields that are null until the end."""
        generation, asked = self._request.generation, self._asked
        output = [
            _item(block, "completed" if block.is_complete else "incomplete")
            for block in self._blocks
        ]
        return {
            "id": generation.request_id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": (asked.reasoning or {}).get("effort"), "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": generation.sampling.temperature,
            "text": {"format": _text_format(asked)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": _tools(asked),
            "top_logprobs": self._request.top_logprobs or 0,
            "top_p": generation.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
            **known,
        }


def _item(block: Block, status: str) -> dict[str, Any]:
    if block.call is not None:
        return {
            "id": block.id,
            "type": "function_call",
            "status": status,
            "call_id": block.call.id,
            "name": block.call.name,
            "arguments": block.text,
        }
    # A block has its content from its first text on.
    content = [_part(block)] if block.pieces or not block.is_open else []
    if block.kind == "reasoning":
        return {
            "id": block.id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": content,
            "encrypted_content": None,
        }
    return {
        "id": block.id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {
        "type": "output_text",
        "text": block.text,
        "annotations": [],
        "logprobs": block.logprobs,
    }


def _text_format(asked: ResponsesRequest) -> dict[str, Any]:
    given = asked.text.format if asked.text else None
    return given or {"type": "text"}


def _tools(asked: ResponsesRequest) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
        for tool in asked.tools or ()
    ]
