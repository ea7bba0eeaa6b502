"""Format of /v1/messages: events of a stream, or one message."""

import json
import math
from typing import Any

from services.gateway.rest.blocks import Block, BlockFormatter, Kind
from services.gateway.rest.errors import anthropic_error
from services.gateway.rest.responses import Event
from services.gateway.usage import RequestUsage
from winnow.errors import WinnowError


class MessagesFormatter(BlockFormatter):
    """Format of /v1/messages."""

    def begin(self) -> list[Event]:
        """The usage is not known yet, nor how much of the prompt is cached."""
        prompt = self._request.generation.prompts[0]
        usage = _usage(len(prompt.token_ids), 0, 0)
        return [_event("message_start", message=self._message([], None, None, usage))]

    def failure(self, error: WinnowError) -> Event:
        return Event(anthropic_error(error, self._request.generation.request_id), "error")

    def _ended(self, whole: dict[str, Any]) -> list[Event]:
        delta = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
        return [
            _event("message_delta", delta=delta, usage=whole["usage"]),
            _event("message_stop"),
        ]

    def _object(self, usage: RequestUsage) -> dict[str, Any]:
        told = usage.to_json()
        cached = told["prompt_tokens_details"]["cached_tokens"]
        counts = _usage(told["prompt_tokens"], told["completion_tokens"], cached)
        thinking = {"output_tokens_details": {"thinking_tokens": self._num_reasoning_tokens}}
        content = [_content(block) for block in self._blocks]
        return self._message(
            content, *self._stop(), {**counts, **thinking, "winnow": told["winnow"]}
        )

    def _message(
        self,
        content: list[dict[str, Any]],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "id": self._request.generation.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._request.generation.model_name,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        }

    def _stop(self) -> tuple[str, str | None]:
        """Why the answer ended, and at which stop sequence."""
        if self._was_cut:
            return "max_tokens", None
        stopped_at = self._last.stop_reason if self._last else None
        if isinstance(stopped_at, str):
            return "stop_sequence", stopped_at
        called = any(block.call for block in self._blocks)
        return ("tool_use" if called else "end_turn"), None

    def _opened(self, block: Block) -> list[Event]:
        return [_event("content_block_start", index=block.index, content_block=_content(block))]

    def _grown(self, block: Block, text: str) -> list[Event]:
        """A call's arguments wait for their end: clients fail at a piece that is no JSON."""
        return [] if block.call is not None else [_block_delta(block, _delta(block, text))]

    def _closed(self, block: Block) -> list[Event]:
        return [
            *(_block_delta(block, delta) for delta in _last_deltas(block)),
            _event("content_block_stop", index=block.index),
        ]

    def _block_id(self, kind: Kind) -> str:
        return ""


def _event(name: str, **fields: Any) -> Event:  # noqa: ANN401 - an event's, in JSON
    return Event({"type": name, **fields}, name)


def _block_delta(block: Block, delta: dict[str, Any]) -> Event:
    return _event("content_block_delta", index=block.index, delta=delta)


def _last_deltas(block: Block) -> list[dict[str, Any]]:
    """What comes at a block's end.

    A call's input; after thoughts a signature, which is empty: nothing here has to trust them.
    """
    if block.call is not None:
        tool_input = json.dumps(tool_input_of(block.text), ensure_ascii=False)
        return [{"type": "input_json_delta", "partial_json": tool_input}]
    return [{"type": "signature_delta", "signature": ""}] if block.kind == "reasoning" else []


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _content(block: Block) -> dict[str, Any]:
    call = block.call
    if call is not None:
        tool_input = tool_input_of(block.text)
        return {"type": "tool_use", "id": call.id, "name": call.name, "input": tool_input}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text, "citations": None}


def _usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """input_tokens: those that were not cached."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def tool_input_of(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; empty if they are none.

    A model may write what JSON does not have: NaN and numbers out of range become null, half of a
    surrogate pair a question mark.
    """
    try:
        parsed = json.loads(arguments, parse_float=_finite, parse_constant=lambda _: None)
        text = json.dumps(parsed, ensure_ascii=False).encode(errors="replace")
        cleaned = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cleaned if isinstance(cleaned, dict) else {}


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
