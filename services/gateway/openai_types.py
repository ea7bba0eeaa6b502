"""The bodies of OpenAI's API that Winnow takes, and how a wrong one is named.

Fields that are absent or null have OpenAI's default. Ranges are checked where the value is used,
so that REST and gRPC share the checks; here they are only told, for /openapi.json.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from services.gateway.without_effect import WithoutEffect
from winnow.errors import InvalidRequest, InvalidSetting, UnknownParameter
from winnow.sampling_params import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
ROLES = ("system", "developer", "user", "assistant")
_SHOWN_CHARS = 60

_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPTS = [
    {"type": "string", "minLength": 1},
    _TOKEN_IDS,
    {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKEN_IDS]}, "minItems": 1},
]


def _told(**schema: Any) -> Any:  # noqa: ANN401 - a field's, as pydantic types them
    """What a field's schema says beyond its type."""
    return Field(None, json_schema_extra=schema)


def _asks_for_nothing(value: object) -> bool:
    """Null, and what is empty: clients send fields that they do not use."""
    return value is None or value in ("", [], {})


def _allow_nothing(schema: dict[str, Any]) -> None:
    """Tells of the fields that are not known what may come in them all the same."""
    schema["additionalProperties"] = {"enum": [None, "", [], {}]}


class _Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra=_allow_nothing
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, body: object) -> object:
        """Leaves out what asks for nothing: unknown fields, and null where there is no null."""
        if not isinstance(body, Mapping):
            return body
        return {name: value for name, value in body.items() if not cls._is_nothing(name, value)}

    @classmethod
    def _is_nothing(cls, name: str, value: object) -> bool:
        field = cls.model_fields.get(name)
        if field is None:
            return _asks_for_nothing(value)
        is_nullable = type(None) in get_args(field.annotation) or field.annotation is Any
        return value is None and not is_nullable and not field.is_required()


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's
    include_obfuscation: bool | None = None  # without effect


class WinnowOptions(_Body):
    """`winnow` in a request's body: fields of winnow.PruningSettings.

    An absent field keeps the service's setting; null means none where that is possible.
    """

    method: str = ""
    select_tokens: Integer = 0
    window_size: Integer = 0
    kernel_size: Integer = 0
    observed_layers: Integer = 0
    min_layer: Integer = 0
    threshold: float = 0
    latest_layer: Integer | None = None
    fixed_layer: Integer = 0
    compression: str = ""
    kv_budget: Integer | None = None
    kv_top_p: float = 0
    decode_budget: Integer | None = None
    decode_floor: Integer | None = None
    recompress_interval: Integer = 0
    full_kv_below: bool = False
    recompression: str = ""
    redundancy_weight: float = 0

    def changes(self) -> dict[str, Any]:
        """The fields that the request set."""
        return self.model_dump(exclude_unset=True)


class _Generation(WithoutEffect, _Body):
    """What completions and chat share."""

    model: str
    max_tokens: Integer | None = _told(minimum=1)
    min_tokens: Integer | None = _told(minimum=0)
    temperature: float | None = _told(minimum=0, maximum=2)
    top_p: float | None = _told(exclusiveMinimum=0, maximum=1)
    top_k: Integer | None = _told(minimum=-1)
    min_p: float | None = _told(minimum=0, maximum=1)
    seed: Integer | None = _told(minimum=-1)
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = _told(maxItems=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = _told(minimum=-2, maximum=2)
    frequency_penalty: float | None = _told(minimum=-2, maximum=2)
    repetition_penalty: float | None = _told(exclusiveMinimum=0, maximum=10)
    logit_bias: dict[str, float] | None = None
    n: Integer | None = _told(minimum=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    winnow: WinnowOptions | None = None


class CompletionRequest(_Generation):
    # Text, token ids, or a list of either; prompts.py tells them apart, and names what is wrong.
    prompt: Annotated[Any, WithJsonSchema({"anyOf": _PROMPTS})]
    max_tokens: Integer | None = _told(minimum=0)  # 0 only with echo
    logprobs: Integer | None = _told(minimum=0, maximum=MAX_LOGPROBS)
    echo: bool | None = None


class TextPart(_Body):
    type: str = Field(json_schema_extra={"enum": ["text"]})
    text: str | None = None
    cache_control: Any = None  # for other services' caches

    @model_validator(mode="before")
    @classmethod
    def _other_type_alone(cls, body: object) -> object:
        """Of a part that is no text its type, so that chat.py can say which it is."""
        if not isinstance(body, Mapping) or body.get("type") in (None, "text"):
            return body
        return {"type": body["type"]}


class ChatMessage(_Body):
    """Only an assistant's may have no content; chat.py says of others which has none."""

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    cache_control: Any = None


class ChatParameters(_Body):
    """How a conversation becomes a prompt; as in vLLM."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(_Generation, ChatParameters):
    messages: list[ChatMessage] = Field(json_schema_extra={"minItems": 1})
    max_completion_tokens: Integer | None = _told(minimum=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = None


class TokenizeRequest(ChatParameters):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[Integer]


_RequestBody = TypeVar("_RequestBody", bound=_Body)


def validate(cls: type[_RequestBody], body: Mapping[str, Any]) -> _RequestBody:
    """The body as `cls`.

    Raises UnknownParameter, or InvalidRequest for one that is missing, or InvalidSetting for one
    of the wrong type; each names the parameter.
    """
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        # Of the types that a value may have, the one that fits it best has the innermost error.
        errors = error.errors(include_url=False, include_context=False)
        first = max(errors, key=lambda one: len(one["loc"]))
        raise _named(body, first["type"], first["loc"], first["msg"], first["input"]) from error


def _named(
    body: Mapping[str, Any], kind: str, loc: tuple[int | str, ...], message: str, value: object
) -> InvalidRequest:
    param = _path(body, loc, missing=kind == "missing")
    if kind == "extra_forbidden":
        return UnknownParameter(f"unknown parameter: {param}", param=param)
    if kind == "missing":
        return InvalidRequest(f"missing parameter: {param}", param=param)
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
    return InvalidSetting(f"{param} is {shown}: {message.lower()}", param=param)


def _path(body: object, loc: tuple[int | str, ...], *, missing: bool) -> str:
    """`winnow.kv_budget`, `messages[1].content`: pydantic's path, less its names of union types."""
    path = ""
    for idx, part in enumerate(loc):
        if isinstance(part, int) and isinstance(body, list):
            path, body = f"{path}[{part}]", body[part]
        elif isinstance(body, Mapping) and part in body:
            path, body = f"{path}.{part}", body[part]
        elif missing and idx == len(loc) - 1:
            path = f"{path}.{part}"
    return path.removeprefix(".")
