"""/v1/messages as a chat request."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.body import validate
from services.gateway.client_names import client_names
from services.gateway.rest.bodies import Sampling
from services.gateway.rest.messages_bodies import (
    Block,
    ClientTool,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from services.gateway.rest.requests import OpenAIRequest, RequestReader
from services.gateway.rest.tokenize import Translation
from services.gateway.rest.translated import ChatMessages, Translated, without_nothing
from services.gateway.rest.unsupported import MESSAGES_PARAMETERS, without_unsupported
from winnow.errors import InvalidRequest, InvalidSetting

_ROLES = ("user", "assistant", "system")
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Claude Code's first system block, for Anthropic's accounting: another text with every request, so
# that no two prompts would begin alike.
_BILLING = "x-anthropic-billing-header:"
_FAILED = "Error"
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "include_reasoning": "thinking",
    "continue_final_message": "messages",
    "tool_choice.function": "tool_choice",
}


def read_messages(reader: RequestReader, body: Mapping[str, Any]) -> OpenAIRequest:
    """A request to /v1/messages.  Raises InvalidRequest or a subclass."""
    request = validate(MessagesRequest, without_unsupported(body, MESSAGES_PARAMETERS))
    return _read(reader, translate_messages(request))


def count_tokens(reader: RequestReader, body: Mapping[str, Any]) -> Translation:
    """The number of tokens of the prompt that a request makes.

    A key pays for them as for `/tokenize`.  Raises as the request does.
    """
    request = validate(CountTokensRequest, without_unsupported(body, MESSAGES_PARAMETERS))
    parsed = _read(reader, translate_count(request))
    num_tokens = len(parsed.generation.prompts[0].token_ids)
    return Translation({"input_tokens": num_tokens}, num_tokens)


def _read(reader: RequestReader, translated: Translated) -> OpenAIRequest:
    with client_names(translated.names):
        return reader.chat(translated.body, "msg_")


def translate_messages(request: MessagesRequest) -> Translated:
    """Raises InvalidRequest or a subclass for what is wrong with the form of the request."""
    prompt = _prompt(request)
    format_name, response_format = _response_format(request)
    choice = request.tool_choice
    body = {
        **prompt.body,
        **{name: getattr(request, name) for name in Sampling.model_fields},
        "max_completion_tokens": request.max_tokens,
        "stop": request.stop_sequences,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "response_format": response_format,
        "include_reasoning": _shows_thinking(request.thinking),
        "stream_options": {"include_usage": True} if request.stream else None,
    }
    names = {"response_format": format_name, "response_format.json_schema": format_name}
    return Translated(without_nothing(body), {**_NAMES, **names, **prompt.names})


def translate_count(request: CountTokensRequest) -> Translated:
    """A chat request with the prompt to count."""
    prompt = _prompt(request)
    tool_choice = "none" if prompt.body.get("tool_choice") == "none" else None
    body = prompt.body | {"tool_choice": tool_choice, "max_completion_tokens": 1}
    return Translated(without_nothing(body | {"model": request.model}), prompt.names)


def _prompt(request: MessagesRequest | CountTokensRequest) -> Translated:
    """What the prompt is made of.  Raises InvalidRequest or a subclass."""
    if not request.messages:
        raise InvalidRequest("messages is empty; it must have at least 1", param="messages")
    chat = ChatMessages()
    _add_system(chat, request.system or "")
    for idx, turn in enumerate(request.messages):
        _add_turn(chat, turn, f"messages[{idx}]")
    tools = _tools(request.tools or ())
    names = {}
    for idx in range(len(tools)):
        names[f"tools[{idx}].function"] = f"tools[{idx}]"
        names[f"tools[{idx}].function.parameters"] = f"tools[{idx}].input_schema"
    body = {
        "messages": chat.messages,
        "tools": tools or None,
        "tool_choice": _tool_choice(request.tool_choice, has_tools=bool(tools)),
        "chat_template_kwargs": _template_kwargs(request),
        "continue_final_message": _is_begun(chat) or None,
    }
    return Translated(body, names | chat.names)


def _add_system(chat: ChatMessages, system: str | Sequence[TextBlock]) -> None:
    if isinstance(system, str):
        first, _, rest = system.partition("\n")
        text = rest if first.startswith(_BILLING) else system
        system = [TextBlock(type="text", text=text)]
    for idx, block in enumerate(system):
        name = f"system[{idx}]"
        block.require_supported(name, name)
        is_billing = idx == 0 and (block.text or "").startswith(_BILLING)
        if block.text and not is_billing:
            chat.say("system", block.text, "system")


def _add_turn(chat: ChatMessages, turn: Turn, name: str) -> None:
    if turn.role not in _ROLES:
        raise InvalidSetting(
            f"{name}.role is {turn.role!r}; known are {', '.join(_ROLES)}", param=f"{name}.role"
        )
    if isinstance(turn.content, str):
        chat.say(turn.role, turn.content, name, joiner=_joiner(turn.role))
        return
    blocks = [(block, f"{name}.content[{idx}]") for idx, block in enumerate(turn.content)]
    # Results come right after the calls, whatever else the user says with them.
    blocks.sort(key=lambda one: not isinstance(one[0], ToolResultBlock))
    for block, block_name in blocks:
        _add_block(chat, block, turn.role, block_name)
    if not blocks:
        chat.say(turn.role, "", name, joiner=_joiner(turn.role))


def _joiner(role: str) -> str:
    """An assistant's blocks are pieces of one text; a user's are texts of their own."""
    return "" if role == "assistant" else "\n"


def _add_block(chat: ChatMessages, block: Block, role: str, name: str) -> None:
    match block:
        case TextBlock():
            block.require_supported(name, name)
            chat.say(role, block.text or "", name, joiner=_joiner(role))
        case ToolResultBlock():
            _require_role("user", role, block, name)
            chat.result(block.tool_use_id, _result(block, name), name, "tool_use_id")
        case ToolUseBlock():
            _require_role("assistant", role, block, name)
            chat.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False), name)
        case ThinkingBlock():
            _require_role("assistant", role, block, name)
            if block.thinking:
                chat.reason(block.thinking, name)


def _require_role(needed: str, role: str, block: Block, name: str) -> None:
    if role != needed:
        raise InvalidRequest(
            f"{name} is of type {block.type!r}, which only a message of the {needed} may have",
            param=name,
        )


def _result(block: ToolResultBlock, name: str) -> str:
    """A failure that says nothing is told as one, or it would look like success."""
    text = _result_text(block, name)
    return _FAILED if block.is_error and not text.strip() else text


def _result_text(block: ToolResultBlock, name: str) -> str:
    if not isinstance(block.content, list):
        return block.content or ""
    for idx, part in enumerate(block.content):
        part_name = f"{name}.content[{idx}]"
        part.require_supported(part_name, part_name)
    return "\n".join(part.text or "" for part in block.content)


def _is_begun(chat: ChatMessages) -> bool:
    """Whether the last message is the beginning of the answer."""
    last = chat.messages[-1] if chat.messages else {}
    return bool(
        last.get("role") == "assistant" and last.get("content") and not last.get("tool_calls")
    )


def _tools(tools: Sequence[ClientTool]) -> list[dict[str, Any]]:
    for idx, tool in enumerate(tools):
        tool.require_supported(f"tools[{idx}]", f"tools[{idx}].type")
    return [
        {
            "type": "function",
            "function": without_nothing(
                {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                }
            ),
        }
        for tool in tools
    ]


def _tool_choice(choice: ToolChoice | None, *, has_tools: bool) -> str | dict[str, Any] | None:
    if choice is None or (choice.type == "auto" and not has_tools):
        return None
    if choice.type in ("any", "tool") and not has_tools:
        raise InvalidSetting(
            f"tool_choice.type is {choice.type!r}, but there are no tools", param="tool_choice"
        )
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _TOOL_CHOICES:
        known = ", ".join((*_TOOL_CHOICES, "tool"))
        raise InvalidSetting(
            f"tool_choice.type is {choice.type!r}; known are {known}", param="tool_choice.type"
        )
    return _TOOL_CHOICES[choice.type]


def _template_kwargs(request: MessagesRequest | CountTokensRequest) -> dict[str, Any] | None:
    """Whether the model thinks, by the name that templates know; otherwise it is up to them."""
    thinking, kwargs = request.thinking, request.chat_template_kwargs
    if thinking is None:
        return kwargs
    if thinking.type not in _THINKING:
        raise InvalidSetting(
            f"thinking.type is {thinking.type!r}; known are {', '.join(_THINKING)}",
            param="thinking.type",
        )
    if thinking.type not in ("enabled", "disabled"):
        return kwargs
    return {"enable_thinking": thinking.type == "enabled", **(kwargs or {})}


def _shows_thinking(thinking: Thinking | None) -> bool | None:
    """False: the model's thoughts are left out of the answer."""
    if thinking is None:
        return None
    return False if thinking.type == "disabled" or thinking.display == "omitted" else None


def _response_format(request: MessagesRequest) -> tuple[str, dict[str, Any] | None]:
    """What the client calls it, and what it is for a chat."""
    given, name = request.output_format, "output_format"
    if given is None and request.output_config is not None:
        given, name = request.output_config.format, "output_config.format"
    if given is None or given.get("type") != "json_schema":
        return name, given
    schema = {key: value for key, value in given.items() if key != "type"}
    return name, {"type": "json_schema", "json_schema": {"name": "output", **schema}}
