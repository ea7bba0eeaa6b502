"""Chat messages of a request, converted to what the chat template reads."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from services.gateway.body import Body, asks_for_nothing
from services.gateway.typed import Piece, one_of
from winnow.chat_template import ChatOptions
from winnow.errors import InvalidRequest, InvalidSetting, UnknownParameter, UnsupportedParameter
from winnow.grammar.source import MAX_NESTING, nesting
from winnow.tool_support import REASONING

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that only an assistant's message may have.
_ASSISTANTS_OWN = ("refusal", "reasoning_content", "reasoning", "tool_calls")


class TextPart(Piece):
    type: str = one_of("text")
    text: str | None = None
    cache_control: Any = None  # ignored; other services use it


class CalledFunction(Body):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str = ""


class ToolCall(Body):
    """Of an assistant's message; whose others must have none, so errors come once that is known."""

    id: str | None = None
    type: str | None = Field(None, json_schema_extra={"enum": ["function"]})
    function: CalledFunction | None = None
    index: int | None = None  # ignored; clients send back what they were streamed


class ChatMessage(Body):
    """Only an assistant's message may have no content; the error for others names the message.

    tool_call_id: the call whose result a message of role tool is.
    """

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    cache_control: Any = None

    @classmethod
    def _is_nothing(cls, name: str, value: object) -> bool:
        """Clients send the fields of other roles, too, without a value."""
        is_ours = name in ("tool_calls", "tool_call_id")
        return (is_ours and asks_for_nothing(value)) or super()._is_nothing(name, value)


class ChatParameters(Body):
    """Options for rendering a conversation as a prompt, OpenAI's and vLLM's."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Each message as `ChatTemplate.render` expects it; role developer becomes system.

    Raises InvalidRequest or InvalidSetting, naming the message; UnsupportedParameter for content
    that is not text.
    """
    if not messages:
        raise InvalidRequest("messages is empty; it must have at least 1", param="messages")
    return [_plain(message, f"messages[{idx}]") for idx, message in enumerate(messages)]


def chat_options(request: ChatParameters) -> ChatOptions:
    """Raises InvalidRequest for contradictory options, InvalidSetting for a bad name."""
    return ChatOptions(
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=request.chat_template_kwargs or {},
        reasoning_effort=request.reasoning_effort,
    )


def _plain(message: ChatMessage, name: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidSetting(
            f"{name}.role is {message.role!r}; known are {', '.join(ROLES)}", param=f"{name}.role"
        )
    if message.role != "assistant":
        _require_no_assistants_own(message, name)
    _require_call_id(message, name)
    role = "system" if message.role == "developer" else message.role
    reasoning = message.reasoning_content or message.reasoning
    return {
        "role": role,
        "content": _content(message, name),
        **({"name": message.name} if message.name else {}),
        **(dict.fromkeys(REASONING, reasoning) if reasoning else {}),
        **({"tool_calls": _calls(message.tool_calls, name)} if message.tool_calls else {}),
        **({"tool_call_id": message.tool_call_id} if message.tool_call_id else {}),
    }


def _calls(calls: Sequence[ToolCall], name: str) -> list[dict[str, Any]]:
    return [_call(call, f"{name}.tool_calls[{idx}]") for idx, call in enumerate(calls)]


def _call(call: ToolCall, name: str) -> dict[str, Any]:
    if call.type not in (None, "function"):
        raise UnsupportedParameter(
            f"{name}.type is {call.type!r}; only function is supported", param=f"{name}.type"
        )
    if call.function is None:
        raise InvalidRequest(f"missing parameter: {name}.function", param=f"{name}.function")
    arguments = _arguments(call.function.arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function, **({"id": call.id} if call.id else {})}


def _arguments(text: str) -> dict[str, Any] | str:
    """The object that the text is JSON of, or the text; models write other things as well.

    What is nested deeper than templates can write stays text, too.
    """
    try:
        arguments = json.loads(text or "{}")
        json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return text
    is_shown = isinstance(arguments, dict) and nesting(arguments) <= MAX_NESTING
    return arguments if is_shown else text


def _require_call_id(message: ChatMessage, name: str) -> None:
    """Messages of role tool name the call whose result they are, and no others do."""
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequest(f"{name} has no tool_call_id", param=f"{name}.tool_call_id")
    if message.role != "tool" and message.tool_call_id:
        raise UnknownParameter(
            f"unknown parameter: {name}.tool_call_id, in a message of {message.role}",
            param=f"{name}.tool_call_id",
        )


def _require_no_assistants_own(message: ChatMessage, name: str) -> None:
    for field in _ASSISTANTS_OWN:
        if getattr(message, field):
            raise UnknownParameter(
                f"unknown parameter: {name}.{field}, in a message of {message.role}",
                param=f"{name}.{field}",
            )


def _content(message: ChatMessage, name: str) -> str | list[dict[str, str]]:
    """The content; of an assistant without any, its refusal, or nothing if it called a tool."""
    if isinstance(message.content, list):
        return [
            {"type": "text", "text": _text(part, f"{name}.content[{idx}]")}
            for idx, part in enumerate(message.content)
        ]
    if message.content is None and message.role != "assistant":
        raise InvalidRequest(f"{name} has no content", param=f"{name}.content")
    return message.content or message.refusal or ""


def _text(part: TextPart, name: str) -> str:
    part.require_supported(name, name)
    return part.text or ""
