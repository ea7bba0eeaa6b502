"""Requests of other APIs as the chat request that they amount to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Translated:
    """body: of a chat request.  names: as `client_names` takes them."""

    body: dict[str, Any]
    names: Mapping[str, str]


@dataclass(slots=True)
class ChatMessages:
    """The messages of a chat request, as they are added one by one.

    names: as in Translated.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def say(self, role: str, text: str, name: str, *, joiner: str | None = None) -> None:
        """Add text.  name: what it is called in the client's body.

        joiner: join it by that to the text of a message of the same role just before.  System
        messages are always joined, since most templates allow only one.
        """
        last = self._last(role)
        if last is not None and last.get("content") is None and "tool_calls" not in last:
            last["content"] = text  # the message that begins with reasoning
        elif last is None or (joiner is None and role != "system"):
            self._begin(role, name, content=text)
        else:
            joiner = "\n\n" if role == "system" else joiner
            last["content"] = (
                text if last["content"] is None else f"{last['content']}{joiner}{text}"
            )

    def reason(self, text: str, name: str) -> None:
        """Add reasoning of the assistant, to its message just before if there is one."""
        message = self._last("assistant") or self._begin("assistant", name, content=None)
        before = message.get("reasoning_content")
        message["reasoning_content"] = text if before is None else f"{before}\n{text}"

    def call(self, call_id: str, function: str, arguments: str, name: str) -> None:
        """Add a call of a tool, to the assistant's message just before if there is one."""
        message = self._last("assistant") or self._begin("assistant", name, content=None)
        calls = message.setdefault("tool_calls", [])
        place = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self.names |= {place: name, f"{place}.function": name}
        calls.append(
            {
                "id": call_id,
                "type": "function",
                "function": {"name": function, "arguments": arguments},
            }
        )

    def result(self, call_id: str, text: str, name: str, id_name: str) -> None:
        """Add the result of a call.  id_name: what the client's body calls the call's id."""
        self.names[f"messages[{len(self.messages)}].tool_call_id"] = f"{name}.{id_name}"
        self._begin("tool", name, content=text, tool_call_id=call_id)

    def _last(self, role: str) -> dict[str, Any] | None:
        """The last message if it is of that role."""
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last["role"] == role else None

    def _begin(self, role: str, name: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
        self.names[f"messages[{len(self.messages)}]"] = name
        self.messages.append({"role": role, **fields})
        return self.messages[-1]


def without_nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something."""
    return {name: value for name, value in fields.items() if value is not None}
