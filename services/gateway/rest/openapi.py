"""The OpenAPI description of the REST API: /openapi.json.

Requests are described by the models that parse them, so the two cannot differ. Responses are
described here; a test compares actual responses with this description.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from services.gateway.rest.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from services.gateway.rest.winnow_options import WinnowOptions, options_schema
from services.gateway.usage import Explanation, Verification, WinnowUsage
from winnow import __version__
from winnow.errors import ERROR_CODES
from winnow.pruning_settings import PruningSettings

_REFERENCES = "#/components/schemas/{model}"
_KEY = "key"
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk in JSON; [DONE] at the end"}},
    "required": ["data"],
}
_Use: TypeAlias = "tuple[type[BaseModel], Literal['validation', 'serialization']]"
_FinishReason = Literal["stop", "length"]
_StopReason = Annotated[
    int | str | None,
    Field(description="the request's stop token or stop string that ended it; null: neither did"),
]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Problem(_Sent):
    message: str
    type: str
    param: str | None
    code: str = Field(description=f"one of {', '.join(ERROR_CODES)}, not_found, method_not_allowed")


class Error(_Sent):
    error: Problem


@dataclass(frozen=True, slots=True)
class SummedUsage(WinnowUsage):
    """prompts: usage of each prompt, if the request has several.

    verify, explain: if requested.
    """

    prompts: tuple[WinnowUsage, ...] = ()
    verify: Verification | None = None
    explain: Explanation | None = None


class PromptTokensDetails(_Sent):
    cached_tokens: int


class Usage(_Sent):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    winnow: SummedUsage


class CompletionLogprobs(_Sent):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Sent):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: _FinishReason
    stop_reason: _StopReason


class TextCompletion(_Sent):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(_Sent):
    token: str
    bytes: list[int] | None
    logprob: float


class ChosenTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Sent):
    content: list[ChosenTokenLogprob]
    refusal: None


class Function(_Sent):
    name: str
    arguments: str = Field(description="JSON text, unless the model wrote something else")


class ToolCall(_Sent):
    id: str
    type: Literal["function"]
    function: Function


class Message(_Sent):
    """content: null if the answer is calls alone. The last two are there if there are some."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(_Sent):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: _StopReason


class ChatCompletion(_Sent):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class SamplingDefaults(_Sent):
    """Defaults of requests; max_tokens null: as many as fit."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int | None


class Caps(_Sent):
    """The most that a request may ask for; null: no limit."""

    select_tokens: int | None
    kv_budget: int | None
    decode_budget: int | None


class WinnowModel(_Sent):
    """How prompts are pruned by default, and what requests may change.

    prefix_cache: what prompts share is kept. chat: the model has a chat template.
    """

    pruning: PruningSettings
    caps: Caps
    prefix_cache: bool
    chat: bool


class Model(_Sent):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    max_output_tokens: int
    sampling_defaults: SamplingDefaults
    winnow: WinnowModel


class Models(_Sent):
    object: Literal["list"]
    data: list[Model]


class Tokens(_Sent):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="each token's text, under return_token_strs")
    special: list[int] | None = Field(description="where in `tokens` control tokens are")


class Text(_Sent):
    prompt: str


class Status(_Sent):
    status: Literal["ok", "ready", "not ready", "downloading"]


@dataclass(frozen=True, slots=True)
class Operation:
    """body: None for GET. streams: the response may be server-sent events instead.

    error: what it answers otherwise.
    """

    path: str
    summary: str
    body: type[BaseModel] | None
    answer: type[BaseModel]
    streams: bool = False
    is_probe: bool = False
    error: type[BaseModel] = Error


_OPERATIONS = (
    Operation(
        "/v1/completions", "Complete prompts", CompletionRequest, TextCompletion, streams=True
    ),
    Operation("/v1/chat/completions", "Answer a chat", ChatRequest, ChatCompletion, streams=True),
    Operation("/tokenize", "The tokens of a text or a chat", TokenizeRequest, Tokens),
    Operation("/detokenize", "The text of tokens", DetokenizeRequest, Text),
    Operation("/v1/models", "The model that is served", None, Models),
    Operation("/v1/models/{name}", "One model, by its name", None, Model),
    Operation("/health", "Whether the process lives", None, Status, is_probe=True),
    Operation("/ready", "Whether it can serve a request now", None, Status, is_probe=True),
)


def describe(
    pruning: PruningSettings, more: Sequence[Operation] = (), *, needs_key: bool
) -> dict[str, Any]:
    """The document.

    pruning: the service's settings.  more: operations besides those here.  needs_key: requests need
    an API key.
    """
    operations = (*_OPERATIONS, *more)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Winnow",
            "version": __version__,
            "description": "OpenAI's and Anthropic's APIs, and in `winnow` how prompts are pruned. "
            "Numbers out of the ranges that this service allows are refused with 400. HEAD is "
            "answered as GET is, without the body.",
        },
        "paths": {one.path: _path(one) for one in operations},
        "components": {
            "schemas": _schemas(pruning, operations),
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
        "security": [{_KEY: []}] if needs_key else [],
    }


def _schemas(pruning: PruningSettings, operations: Sequence[Operation]) -> dict[str, Any]:
    inputs: list[_Use] = [(one.body, "validation") for one in operations if one.body is not None]
    outputs: list[_Use] = [(one.answer, "serialization") for one in operations]
    errors: list[_Use] = [(one.error, "serialization") for one in operations]
    models = [*inputs, *outputs, *dict.fromkeys(errors)]
    schemas: dict[str, Any] = models_json_schema(models, ref_template=_REFERENCES)[1]["$defs"]
    name = WinnowOptions.__name__
    return {**schemas, name: options_schema(schemas[name], pruning)}


def _path(one: Operation) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": one.summary, "responses": _responses(one)}
    if one.is_probe:
        operation["security"] = []
    if "{name}" in one.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    if one.body is None:
        return {"get": operation}
    operation["requestBody"] = {"required": True, "content": _json(one.body)}
    return {"post": operation}


def _responses(one: Operation) -> dict[str, Any]:
    content = _json(one.answer)
    if one.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return {
        "200": {"description": "done", "content": content},
        **({"503": {"description": "not now", "content": content}} if one.is_probe else {}),
        "default": {"description": "one typed error", "content": _json(one.error)},
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCES.format(model=model.__name__)}}}
