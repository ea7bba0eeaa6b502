"""A conversation with tools, as the chat template can show it.

What a template does not show itself is put into words: the list of tools, calls, and results.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.answers.formats.base import Call, ToolFormat
from winnow.tool_support import REASONING, Message, Tool, ToolSupport

_EXAMPLE: Call = {"function": {"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}}


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether there are calls of tools in the messages, or results."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def shown_conversation(
    conversation: Conversation, support: ToolSupport, tool_format: ToolFormat
) -> Conversation:
    """The conversation for a template with this support, which then shows all of it.

    The arguments of its calls are an object, or text that is no JSON of one.
    """
    messages, tools = conversation.messages, conversation.tools
    in_words = bool(tools) and not support.tools
    writes_calls = in_words or not support.calls
    knows_tools = support.tools or support.calls  # else it shows results by chance
    writes_results = in_words or not (support.results and knows_tools)
    if writes_results:
        messages = list(_results_in_words(messages))
    if writes_calls:
        messages = [_calls_in_words(message, tool_format) for message in messages]
    if writes_calls or writes_results:
        messages = _neighbours_joined(messages)
    if in_words:
        messages = _begun_with(tools_in_words(tools, tool_format), messages, support)
    if not writes_calls:
        messages = [_for_template(message, support, tool_format) for message in messages]
        messages = messages if support.parallel_calls else list(_one_call_each(messages))
    if not support.undescribed_tools:
        tools = [_described(tool) for tool in tools]
    return Conversation(messages, () if in_words else tools)


def tools_in_words(tools: Sequence[Tool], tool_format: ToolFormat) -> str:
    """The functions and how to call them, for a model whose template does not tell."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n{listed}\n"
        f"To call one, answer with nothing but this:\n{tool_format.written([_EXAMPLE])}\n"
        f"To call several, answer like this:\n{tool_format.written([_EXAMPLE] * 2)}"
    )


def _described(tool: Tool) -> Tool:
    return {**tool, "function": {"description": "", **tool["function"]}}


def _results_in_words(messages: Sequence[Message]) -> Iterator[Message]:
    """Messages of role tool become a user's, with the name of the function that was called."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]
        if message["role"] == "tool":
            name = names.get(message.get("tool_call_id", "")) or message.get("name", "the function")
            yield {"role": "user", "content": f"Result of {name}:\n{_text(message)}"}
        else:
            yield message


def _calls_in_words(message: Message, tool_format: ToolFormat) -> Message:
    """A message whose calls are part of its text, as the model would have written them."""
    if not message.get("tool_calls"):
        return message
    written = tool_format.written(message["tool_calls"])
    content = "\n".join(filter(None, (_text(message), written)))
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**others, "content": content}


def _neighbours_joined(messages: Sequence[Message]) -> list[Message]:
    """One message of each user's or assistant's turn, since many templates want them in turn."""
    done: list[Message] = []
    for message in messages:
        last = done[-1] if done else message
        is_turn = message["role"] in ("user", "assistant") and last["role"] == message["role"]
        if last is message or not is_turn or message.get("tool_calls") or last.get("tool_calls"):
            done.append(message)
        else:
            done[-1] = _joined(last, message)
    return done


def _joined(first: Message, second: Message) -> Message:
    """One message of two. It has the texts of both, and the name of the first if there is one."""
    texts = {"content": f"{_text(first)}\n\n{_text(second)}"}
    for key in (first.keys() & second.keys()) - {"role", "content", "name"}:
        texts[key] = f"{first[key]}\n\n{second[key]}"
    return {**second, **first, **texts}


def _begun_with(text: str, messages: Sequence[Message], support: ToolSupport) -> list[Message]:
    """The messages with this text before them: in the system message if the template has one."""
    role = "system" if support.system else "user"
    first = messages[0]
    if first["role"] == role:
        return [{**first, "content": f"{text}\n\n{_text(first)}"}, *messages[1:]]
    return [{"role": role, "content": text}, *messages]


def _for_template(message: Message, support: ToolSupport, tool_format: ToolFormat) -> Message:
    """The message with ids and arguments that the template accepts."""
    changed: dict[str, Any] = {}
    if "tool_call_id" in message:
        changed["tool_call_id"] = tool_format.template_id(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {
                **call,
                "id": tool_format.template_id(call.get("id", "")),
                "function": _function(call["function"], support),
            }
            for call in message["tool_calls"]
        ]
        if not support.reasoned_calls:
            changed |= _said_as_reasoning(message)
    return {**message, **changed}


def _said_as_reasoning(message: Message) -> Message:
    """The fields that change where reasoning and text must be one: all of it is reasoning."""
    text = _text(message)
    said = {name: f"{message[name]}\n\n{text}" for name in REASONING if message.get(name)}
    return {**said, "content": ""} if said and text else {}


def _function(function: Mapping[str, Any], support: ToolSupport) -> Mapping[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        given = arguments if support.text_arguments else {"arguments": arguments}
    else:
        is_object = support.object_arguments
        given = arguments if is_object else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": given}


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """Messages with one call at most, each followed by its result, for templates that want so."""
    idx = 0
    while idx < len(messages):
        message, idx = messages[idx], idx + 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        results: list[Message] = []
        while idx < len(messages) and messages[idx]["role"] == "tool":
            results.append(messages[idx])
            idx += 1
        for number, call in enumerate(calls):
            own = {"role": message["role"], "content": ""} if number else message
            yield {**own, "tool_calls": [call]}
            yield from (one for one in results if one.get("tool_call_id") == call.get("id"))
        ids = [call.get("id") for call in calls]
        yield from (one for one in results if one.get("tool_call_id") not in ids)


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
