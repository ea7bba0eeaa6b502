"""What a chat template makes of tools, found out by rendering some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from winnow.errors import InvalidRequest

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

# The names under which templates look for an assistant's reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLED = "winnowcalled"  # name of the function that is called
_TOOL, _ASKED, _VALUE, _RESULT = "winnowtool", "winnowasked", "winnowvalue", "winnowresult"
_SAID = {"content": "winnowsaid", **dict.fromkeys(REASONING, "winnowthought")}
_IDS = ("winnowid1", "winnowid2")  # some templates want nine letters and digits
_FUNCTION = {"name": _TOOL, "parameters": {"type": "object", "properties": {}, "required": []}}
_TOOLS: Sequence[Tool] = ({"type": "function", "function": {**_FUNCTION, "description": ""}},)
_UNDESCRIBED: Sequence[Tool] = ({"type": "function", "function": _FUNCTION},)


@dataclass(frozen=True, slots=True)
class ToolSupport:
    """What a template shows.

    tools: the list of them.  undescribed_tools: those without a description, too.
    object_arguments, text_arguments: calls whose arguments are an object, or text.
    parallel_calls: several calls in one message.  reasoned_calls: calls after reasoning and text.
    results: messages of role tool.  system: a message of role system.
    call: the rendered text around a call of CALLED, if any is shown.
    """

    tools: bool
    undescribed_tools: bool
    object_arguments: bool
    text_arguments: bool
    parallel_calls: bool
    reasoned_calls: bool
    results: bool
    system: bool
    call: str

    @property
    def calls(self) -> bool:
        return self.object_arguments or self.text_arguments

    def nothing(self) -> "ToolSupport":
        """As of a template that shows nothing of tools."""
        return replace(
            self, tools=False, object_arguments=False, text_arguments=False, results=False
        )


def probe(
    render: Callable[[Sequence[Message], Sequence[Tool]], str], *, with_tools: bool
) -> ToolSupport:
    """What is shown in a conversation with or without tools.

    render: raises InvalidRequest for what the template refuses.
    """

    def shown(*messages: Message, tools: Sequence[Tool] = ()) -> str:
        try:
            return render(messages, tools)
        except InvalidRequest:
            return ""

    asked = {"role": "user", "content": _ASKED}

    shows_tools = _TOOL in shown(asked, tools=_TOOLS).lower()
    tools = _TOOLS if shows_tools and with_tools else ()
    result = _result(_IDS[0])
    by_object = shown(asked, _calls({"key": _VALUE}), result, tools=tools)
    by_text = shown(asked, _calls(f'{{"key": "{_VALUE}"}}'), result, tools=tools)
    one = by_object if _VALUE in by_object.lower() else by_text
    arguments: Any = {"key": _VALUE} if one is by_object else f'{{"key": "{_VALUE}"}}'
    two = shown(asked, _calls(arguments, arguments), result, _result(_IDS[1]), tools=tools)
    return ToolSupport(
        tools=shows_tools,
        undescribed_tools=_TOOL in shown(asked, tools=_UNDESCRIBED).lower(),
        object_arguments=_VALUE in by_object.lower(),
        text_arguments=_VALUE in by_text.lower(),
        parallel_calls=two.lower().count(_VALUE) == 2 * one.lower().count(_VALUE) > 0,
        reasoned_calls=_VALUE
        in shown(asked, _calls(arguments) | _SAID, result, tools=tools).lower(),
        results=_RESULT in one.lower(),
        system=_RESULT in shown({"role": "system", "content": _RESULT}, asked).lower(),
        call=one.partition(_ASKED)[2].partition(_RESULT)[0],
    )


def _calls(*arguments: Mapping[str, str] | str) -> dict[str, Any]:
    calls = [
        {"id": call_id, "type": "function", "function": {"name": CALLED, "arguments": one}}
        for call_id, one in zip(_IDS, arguments, strict=False)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(call_id: str) -> Message:
    return {"role": "tool", "content": _RESULT, "tool_call_id": call_id, "name": CALLED}
