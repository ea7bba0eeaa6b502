"""/v1/responses as a chat request."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.body import validate
from services.gateway.client_names import client_names
from services.gateway.rest.bodies import Sampling
from services.gateway.rest.requests import OpenAIRequest, RequestReader
from services.gateway.rest.responses_bodies import (
    ContentPart,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from services.gateway.rest.translated import ChatMessages, Translated, without_nothing
from services.gateway.rest.unsupported import RESPONSES_PARAMETERS, without_unsupported
from winnow.errors import InvalidRequest, InvalidSetting, UnsupportedParameter

_ROLES = ("user", "assistant", "system", "developer")
_STATEFUL = ("previous_response_id", "conversation")
_LOGPROBS = "message.output_text.logprobs"
# What else may be included: parts of items that never occur here.
_INCLUDABLE = (
    *("reasoning.encrypted_content", "message.input_image.image_url"),
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url"),
)
MAX_ID_CHARS = 512
# OpenAI's own bounds.
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_SAME = (
    *Sampling.model_fields,
    *("parallel_tool_calls", "structured_outputs", "chat_template_kwargs", "stop"),
)
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "tool_choice.function": "tool_choice",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}


def read_responses(
    reader: RequestReader, body: Mapping[str, Any]
) -> tuple[ResponsesRequest, OpenAIRequest]:
    """A request to /v1/responses.  Raises InvalidRequest or a subclass."""
    for name in _STATEFUL:
        if body.get(name):
            raise UnsupportedParameter(
                f"{name} is not supported: nothing is stored; send the whole conversation in input",
                param=name,
            )
    request = validate(ResponsesRequest, without_unsupported(body, RESPONSES_PARAMETERS))
    translated = translate_responses(request)
    with client_names(translated.names):
        return request, reader.chat(translated.body, "resp_")


def translate_responses(request: ResponsesRequest) -> Translated:
    """Raises InvalidRequest or a subclass for what is wrong with the form of the request."""
    _require_bounded(request)
    chat = ChatMessages()
    if request.instructions:
        chat.say("system", request.instructions, "instructions")
    _add_input(chat, request.input)
    tools = _tools(request.tools or ())
    body = {
        **{name: getattr(request, name) for name in _SAME},
        "messages": chat.messages,
        "max_completion_tokens": request.max_output_tokens,
        "reasoning_effort": (request.reasoning or {}).get("effort"),
        "tools": tools or None,
        "tool_choice": _tool_choice(request, has_tools=bool(tools)),
        "response_format": _response_format(request),
        "stream_options": {"include_usage": True} if request.stream else None,
        **_logprobs(request),
    }
    names = {f"tools[{idx}].function": f"tools[{idx}]" for idx in range(len(tools))}
    return Translated(without_nothing(body), _NAMES | names | chat.names)


def _require_bounded(request: ResponsesRequest) -> None:
    """Raises InvalidSetting for too much of what is only repeated in the response."""
    for name in ("prompt_cache_key", "safety_identifier", "user"):
        _require_length(name, getattr(request, name) or "", MAX_ID_CHARS, name)
    metadata = request.metadata or {}
    if len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidSetting(
            f"metadata has {len(metadata):,} pairs; the limit is {MAX_METADATA_PAIRS}",
            param="metadata",
        )
    for idx, (key, value) in enumerate(metadata.items()):
        _require_length(f"key {idx} of metadata", key, MAX_METADATA_KEY_CHARS, "metadata")
        if not isinstance(value, str):
            raise InvalidSetting(f"metadata.{key} must be a string", param="metadata")
        _require_length(f"metadata.{key}", value, MAX_METADATA_VALUE_CHARS, "metadata")


def _require_length(name: str, text: str, most: int, param: str) -> None:
    if len(text) > most:
        raise InvalidSetting(
            f"{name} has {len(text):,} characters; the limit is {most}", param=param
        )


def _add_input(chat: ChatMessages, given: str | Sequence[InputItem]) -> None:
    if isinstance(given, str):
        chat.say("user", given, "input")
        return
    for idx, item in enumerate(given):
        _add_item(chat, item, f"input[{idx}]")


def _add_item(chat: ChatMessages, item: InputItem, name: str) -> None:
    match item:
        case FunctionCallItem():
            chat.call(item.call_id, item.name, item.arguments, name)
        case FunctionCallOutputItem():
            text = _text(item.output, f"{name}.output", joiner="\n")
            chat.result(item.call_id, text, name, "call_id")
        case ReasoningItem():
            _add_reasoning(chat, item, name)
        case MessageItem():
            _add_message(chat, item, name)


def _add_message(chat: ChatMessages, item: MessageItem, name: str) -> None:
    item.require_supported(name, name)
    if item.role not in _ROLES:
        raise InvalidSetting(
            f"{name}.role is {item.role!r}; known are {', '.join(_ROLES)}", param=f"{name}.role"
        )
    if item.content is None:
        raise InvalidRequest(f"missing parameter: {name}.content", param=f"{name}.content")
    role = "system" if item.role == "developer" else item.role
    # Neighbours of one role become one: many templates want the roles to alternate.
    chat.say(role, _text(item.content, f"{name}.content"), name, joiner="\n")


def _add_reasoning(chat: ChatMessages, item: ReasoningItem, name: str) -> None:
    """Without a text, such as with another service's encrypted one, nothing is added."""
    field = "content" if item.content else "summary"
    text = _text(getattr(item, field) or "", f"{name}.{field}", joiner="\n")
    if text:
        chat.reason(text, name)


def _text(content: str | Sequence[ContentPart], name: str, joiner: str = "") -> str:
    if isinstance(content, str):
        return content
    for idx, part in enumerate(content):
        part.require_supported(f"{name}[{idx}]", f"{name}[{idx}]")
    return joiner.join(part.text or part.refusal or "" for part in content)


def _tools(tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    for idx, tool in enumerate(tools):
        tool.require_supported(f"tools[{idx}]", f"tools[{idx}].type")
    fields = ("name", "description", "parameters", "strict")
    return [
        {
            "type": "function",
            "function": without_nothing({name: getattr(tool, name) for name in fields}),
        }
        for tool in tools
    ]


def _tool_choice(request: ResponsesRequest, *, has_tools: bool) -> str | dict[str, Any] | None:
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return None if choice == "auto" and not has_tools else choice


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    given = request.text.format if request.text else None
    if given is None or given.get("type") != "json_schema":
        return given
    schema = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _logprobs(request: ResponsesRequest) -> dict[str, Any]:
    for name in request.include or ():
        if name not in (_LOGPROBS, *_INCLUDABLE):
            raise UnsupportedParameter(f"include has {name!r}, which is not known", param="include")
    wanted = bool(request.top_logprobs) or _LOGPROBS in (request.include or ())
    return {"logprobs": True, "top_logprobs": request.top_logprobs} if wanted else {}
