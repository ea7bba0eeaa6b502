"""Chat messages of a request, converted to what the chat template reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from services.gateway.body import Body
from winnow.chat_template import ChatOptions
from winnow.errors import InvalidRequest, InvalidSetting, UnknownParameter, UnsupportedParameter

ROLES = ("system", "developer", "user", "assistant")
# Fields that only an assistant's message may have.
_ASSISTANTS_OWN = ("refusal", "reasoning_content", "reasoning")
# The names under which templates look for an assistant's reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class TextPart(Body):
    type: str = Field(json_schema_extra={"enum": ["text"]})
    text: str | None = None
    cache_control: Any = None  # ignored; other services use it

    @model_validator(mode="before")
    @classmethod
    def _other_type_alone(cls, body: object) -> object:
        """Keep only the type of a part that is not text, so that the error can name it."""
        if not isinstance(body, Mapping) or body.get("type") in (None, "text"):
            return body
        return {"type": body["type"]}


class ChatMessage(Body):
    """Only an assistant's message may have no content; the error for others names the message."""

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    cache_control: Any = None


class ChatParameters(Body):
    """Options for rendering a conversation as a prompt, as in vLLM."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


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
    )


def _plain(message: ChatMessage, name: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidSetting(
            f"{name}.role is {message.role!r}; known are {', '.join(ROLES)}", param=f"{name}.role"
        )
    if message.role != "assistant":
        _require_no_assistants_own(message, name)
    role = "system" if message.role == "developer" else message.role
    reasoning = message.reasoning_content or message.reasoning
    return {
        "role": role,
        "content": _content(message, name),
        **({"name": message.name} if message.name else {}),
        **(dict.fromkeys(_REASONING, reasoning) if reasoning else {}),
    }


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
        return [{"type": "text", "text": _text(part, name)} for part in message.content]
    if message.content is None and message.role != "assistant":
        raise InvalidRequest(f"{name} has no content", param=f"{name}.content")
    return message.content or message.refusal or ""


def _text(part: TextPart, name: str) -> str:
    if part.type != "text":
        raise UnsupportedParameter(
            f"{name} has content of type {part.type!r}; only text is supported",
            param=f"{name}.content",
        )
    return part.text or ""
