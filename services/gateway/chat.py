"""Chat messages as the chat template reads them: role, text, and what else a template may show."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from services.gateway.body import Body
from winnow.chat_template import ChatOptions
from winnow.errors import InvalidRequest, InvalidSetting, UnknownParameter, UnsupportedParameter

ROLES = ("system", "developer", "user", "assistant")
# What only an assistant's message may have.
_ASSISTANTS_OWN = ("refusal", "reasoning_content", "reasoning")
# Under which names templates look for an assistant's reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class TextPart(Body):
    type: str = Field(json_schema_extra={"enum": ["text"]})
    text: str | None = None
    cache_control: Any = None  # for other services' caches

    @model_validator(mode="before")
    @classmethod
    def _other_type_alone(cls, body: object) -> object:
        """Of a part that is no text its type, so that it can be said which it is."""
        if not isinstance(body, Mapping) or body.get("type") in (None, "text"):
            return body
        return {"type": body["type"]}


class ChatMessage(Body):
    """Only an assistant's may have no content; of others it is said which has none."""

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    cache_control: Any = None


class ChatParameters(Body):
    """How a conversation becomes a prompt; as in vLLM."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Each message as `ChatTemplate.render` takes it; developer is another system.

    Raises InvalidRequest or InvalidSetting that names the message, UnsupportedParameter for
    content that is no text.
    """
    if not messages:
        raise InvalidRequest("messages is empty; it must have at least 1", param="messages")
    return [_plain(message, f"messages[{idx}]") for idx, message in enumerate(messages)]


def chat_options(request: ChatParameters) -> ChatOptions:
    """Raises InvalidRequest for options that contradict each other, InvalidSetting for a name."""
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
    """An assistant that said nothing else has refused, or called a tool: it has said nothing."""
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
