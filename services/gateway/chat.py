"""Chat messages as the chat template wants them: a role and a text."""

from collections.abc import Sequence

from services.gateway.openai_types import ROLES, ChatMessage
from winnow.errors import InvalidRequest, InvalidSetting, UnsupportedParameter


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Each message's role and text; parts of text are joined, developer is another system.

    Raises InvalidRequest or InvalidSetting that names the message, UnsupportedParameter for
    content that is no text.
    """
    if not messages:
        raise InvalidRequest("messages is empty; it must have at least 1", param="messages")
    return [_plain(message, f"messages[{idx}]") for idx, message in enumerate(messages)]


def _plain(message: ChatMessage, name: str) -> dict[str, str]:
    if message.role not in ROLES:
        raise InvalidSetting(
            f"{name}.role is {message.role!r}; known are {', '.join(ROLES)}", param=f"{name}.role"
        )
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _text(message, name)}


def _text(message: ChatMessage, name: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise InvalidRequest(f"{name} has no content", param=f"{name}.content")
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise UnsupportedParameter(
                f"{name} has content of type {part.type!r}; only text is supported",
                param=f"{name}.content",
            )
    return "".join(part.text or "" for part in message.content)
