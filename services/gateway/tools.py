"""Tools of a request: functions that the model may call, in the prompt and in the answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from services.common.settings import Settings
from services.gateway.body import Body
from services.gateway.typed import Typed, one_of
from winnow.answers import AnswerFormat
from winnow.answers.conversation import Conversation, has_calls, shown_conversation
from winnow.answers.formats.base import ToolFormat
from winnow.answers.formats.detect import detect, named
from winnow.answers.formats.generic_json import GenericJson
from winnow.answers.formats.harmony import Harmony
from winnow.answers.frames import CHANNELS, FRAMES, THINKING, Frame
from winnow.chat_template import ChatOptions, ChatTemplate
from winnow.errors import InvalidRequest, InvalidSetting, UnsupportedParameter
from winnow.grammar.source import MAX_NESTING, nesting
from winnow.marked_text import plain
from winnow.tokenizer import Tokenizer
from winnow.tool_support import Message, Tool, ToolSupport

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MODES: Sequence[Literal["none", "auto", "required"]] = ("none", "auto", "required")


class FunctionTool(Body):
    name: str = Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"})
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Typed):
    type: str = one_of("function")
    function: FunctionTool | None = None


class ToolParameters(Body):
    """OpenAI's `tools` and `tool_choice`."""

    tools: list[ToolBody] | None = Field(None, json_schema_extra={"maxItems": MAX_TOOLS})
    tool_choice: str | dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools as the chat template takes them, and whether they may or must be called.

    name: the tool that must be called, if mode is `named`.  parallel: whether an answer may call
    several.
    """

    tools: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str | None = None
    parallel: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.name is None:
            return self.tools
        return tuple(tool for tool in self.tools if tool["function"]["name"] == self.name)


def read_tools(request: ToolParameters, *, parallel: bool | None) -> ToolUse:
    """Raises InvalidSetting or UnsupportedParameter, naming the field."""
    given = request.tools or []
    if len(given) > MAX_TOOLS:
        raise InvalidSetting(
            f"tools has {len(given)} entries; at most {MAX_TOOLS} are allowed", param="tools"
        )
    tools = tuple(_tool(tool, f"tools[{idx}]") for idx, tool in enumerate(given))
    names = [tool["function"]["name"] for tool in tools]
    for idx, name in enumerate(names):
        if name in names[:idx]:
            raise InvalidSetting(
                f"tools[{idx}].function.name is {name!r}, as that of another tool is",
                param=f"tools[{idx}].function.name",
            )
    mode, name = _choice(request.tool_choice, names)
    if mode == "none":
        return ToolUse()
    return ToolUse(tools, mode, name, parallel is not False)


def _tool(tool: ToolBody, name: str) -> Tool:
    if tool.type != "function":
        raise UnsupportedParameter(
            f"{name}.type is {tool.type!r}; only function is supported", param=f"{name}.type"
        )
    function = tool.function
    if function is None:
        raise InvalidRequest(f"missing parameter: {name}.function", param=f"{name}.function")
    if not _NAME.fullmatch(function.name):
        raise InvalidSetting(
            f"{name}.function.name is {function.name[:80]!r}; it must have 1 to 64 of "
            "A-Z a-z 0-9 _ . -",
            param=f"{name}.function.name",
        )
    if (depth := nesting(function.parameters)) > MAX_NESTING:
        raise InvalidSetting(
            f"{name}.function.parameters is nested {depth} deep; the limit is {MAX_NESTING}",
            param=f"{name}.function.parameters",
        )
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


def _choice(
    choice: str | dict[str, Any] | None, names: Sequence[str]
) -> tuple[Literal["none", "auto", "required", "named"], str | None]:
    if isinstance(choice, dict):
        return "named", _chosen_name(choice, names)
    if choice is None or choice == "auto":
        return ("auto" if names else "none"), None
    if choice == "required" and not names:
        raise InvalidSetting(
            "tool_choice is 'required', but there are no tools", param="tool_choice"
        )
    for mode in _MODES:
        if choice == mode:
            return mode, None
    raise InvalidSetting(
        f"tool_choice is {choice[:80]!r}; known are {', '.join(_MODES)}, and a function",
        param="tool_choice",
    )


def _chosen_name(choice: Mapping[str, Any], names: Sequence[str]) -> str:
    kind, function = choice.get("type"), choice.get("function")
    if kind != "function":
        raise UnsupportedParameter(
            f"tool_choice.type is {kind!r}; only function is supported", param="tool_choice.type"
        )
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            "missing parameter: tool_choice.function.name", param="tool_choice.function.name"
        )
    if name not in names:
        raise InvalidSetting(
            f"tool_choice.function.name is {name[:80]!r}, which is not among the tools",
            param="tool_choice",
        )
    return name


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    options: ChatOptions,
    use: ToolUse,
    settings: Settings,
) -> str:
    """The prompt for a conversation with these tools.

    Raises InvalidRequest if the template refuses it, or the operator or template takes no tools.
    """
    if not use.tools and not has_calls(messages):
        return tokenizer.chat_text(messages, options)
    support, tool_format = _form(tokenizer.chat_template, use, settings)
    tools = [_shown(tool) for tool in use.tools]
    shown = shown_conversation(Conversation(messages, tools), support, tool_format)
    return tokenizer.chat_text(shown.messages, options, shown.tools)


def answer_format(
    use: ToolUse,
    prompt_text: str,
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    include_reasoning: bool | None,
) -> AnswerFormat | None:
    """How the answer to a chat's prompt is split into parts; None if all of it is text."""
    template = tokenizer.chat_template
    tool_format = _form(template, use, settings)[1] if use.tools else None
    frame = _frame(template, use, settings, tool_format)
    reasoning = "none" if frame is None else frame.begins(plain(prompt_text))
    if frame is THINKING and reasoning == "none":
        frame = None
    if tool_format is None and frame is None:
        return None
    markers = (
        *(tool_format.markers if tool_format else ()),
        *(frame.markers if frame else ()),
    )
    ids = map(tokenizer.added_token_id, markers)
    return AnswerFormat(
        tool_format=tool_format,
        tool_names=frozenset(tool["function"]["name"] for tool in use.callable_tools),
        parallel=use.parallel,
        frame=frame or THINKING,
        reasoning=reasoning,
        shows_reasoning=include_reasoning is not False,
        shown_token_ids=frozenset(i for i in ids if i is not None),
    )


def _shown(tool: Tool) -> Tool:
    """The tool without what does not concern the model."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}


def _form(
    template: ChatTemplate, use: ToolUse, settings: Settings
) -> tuple[ToolSupport, ToolFormat]:
    """What the template shows of tools, and the form of calls in the answer."""
    parser, with_tools = settings.tool_parser, bool(use.tools)
    if with_tools and parser == "off":
        raise UnsupportedParameter("the operator has switched tools off", param="tools")
    support = template.tool_support(with_tools=with_tools)
    source = template.source(with_tools=with_tools)
    if parser == "json":
        return support.nothing(), GenericJson()
    found = detect(support, source) if parser in ("auto", "off") else named(parser, source)
    if found is None and support.tools and with_tools:
        raise UnsupportedParameter(
            "the model's chat template writes calls of tools in a form that is not known; the "
            "operator can set tool_parser to json",
            param="tools",
        )
    return support, found or GenericJson()


def _frame(
    template: ChatTemplate, use: ToolUse, settings: Settings, tool_format: ToolFormat | None
) -> Frame | None:
    """How reasoning is told apart; None if it is not."""
    if isinstance(tool_format, Harmony):
        return CHANNELS
    parser, source = settings.reasoning_parser, template.source(with_tools=bool(use.tools))
    if parser == "auto":
        shown = (one for one in FRAMES.values() if any(sign in source for sign in one.signs))
        return next(shown, None)
    return FRAMES.get(parser)
