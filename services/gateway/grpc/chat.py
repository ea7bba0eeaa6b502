"""Conversations, tools and grammars of a CompleteRequest, read as REST's are."""

from typing import Any

from services.gateway.body import validate
from services.gateway.chat import CalledFunction, ChatMessage, ToolCall, plain_messages
from services.gateway.json_text import parse_object
from services.gateway.structured import AskedGrammar, StructuredOutputs, read_outputs
from services.gateway.tools import ToolParameters, ToolUse, read_tools
from winnow.errors import InvalidSetting
from winnow.v1 import inference_pb2 as pb

_MODES = ("none", "auto", "required")
_NAMED = "function"
# REST's names for the kinds of grammars.
_FIELDS = {"json_schema": "json", "lark": "grammar"}


def messages_of(messages: pb.ChatMessages) -> list[dict[str, Any]]:
    """Messages as the chat template reads them.  Raises InvalidRequest or a subclass."""
    return plain_messages([_message(message) for message in messages.messages])


def _message(message: pb.ChatMessage) -> ChatMessage:
    calls = [
        ToolCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in message.tool_calls
    ]
    return ChatMessage(
        role=message.role,
        content=message.content,
        name=message.name,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id or None,
        reasoning=message.reasoning or None,
    )


def own_names(messages: pb.ChatMessages) -> dict[str, str]:
    """As `client_names` takes them: REST has a tool's fields in an object `function` of its own."""
    tools = {f"tools[{idx}].function": f"tools[{idx}]" for idx in range(len(messages.tools))}
    return tools | {"tool_choice.function.name": "tool_name"}


def tools_of(messages: pb.ChatMessages) -> ToolUse:
    """The tools, and whether they may or must be called.  Raises InvalidRequest or a subclass."""
    body = {
        "tools": [_tool(tool, f"tools[{idx}]") for idx, tool in enumerate(messages.tools)],
        "tool_choice": _choice(messages),
    }
    parallel = messages.parallel_tool_calls if messages.HasField("parallel_tool_calls") else None
    return read_tools(validate(ToolParameters, body), parallel=parallel)


def _tool(tool: pb.Tool, name: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "strict": tool.strict}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        param = f"{name}.parameters"
        function["parameters"] = parse_object(tool.parameters.encode(), param, param)
    return {"type": "function", "function": function}


def _choice(messages: pb.ChatMessages) -> str | dict[str, Any] | None:
    choice = messages.tool_choice
    if choice == _NAMED:
        return {"type": "function", "function": {"name": messages.tool_name}}
    if choice and choice not in _MODES:
        raise InvalidSetting(
            f"tool_choice is {choice[:80]!r}; known are {', '.join((*_MODES, _NAMED))}",
            param="tool_choice",
        )
    return choice or None


def grammar_of(request: pb.CompleteRequest) -> AskedGrammar | None:
    """What the request says that its answers must match.  Raises InvalidRequest or a subclass."""
    kind = request.WhichOneof("grammar")
    if kind is None:
        return None
    value = getattr(request, kind)
    if kind == "choice":
        value = list(value.texts)
    compact = request.disable_any_whitespace
    outputs = {_FIELDS.get(kind, kind): value, "disable_any_whitespace": compact}
    asked = validate(StructuredOutputs, outputs)
    return read_outputs(asked, lambda _field: kind)
