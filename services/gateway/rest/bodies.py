"""Request bodies of OpenAI's API that Winnow accepts.

Fields that are absent or null have OpenAI's default. Ranges are checked where values are used, so
that REST and gRPC share the checks; here they only appear in /openapi.json.
"""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from services.gateway.access.request_limits import MAX_CACHE_SALT_CHARS
from services.gateway.body import Body, Integer
from services.gateway.chat import ChatMessage, ChatParameters
from services.gateway.rest.winnow_options import WinnowOptions
from services.gateway.rest.without_effect import WithoutEffect
from services.gateway.structured import StructuredOutput
from services.gateway.tools import ToolParameters
from winnow.sampling_params import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPTS = [
    {"type": "string", "minLength": 1},
    _TOKEN_IDS,
    {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKEN_IDS]}, "minItems": 1},
]


def _told(**schema: Any) -> Any:  # noqa: ANN401 - a field's, as pydantic types them
    """A field with additional JSON schema entries."""
    return Field(None, json_schema_extra=schema)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's
    include_obfuscation: bool | None = None  # without effect


class Sampling(Body):
    """Fields that all APIs share: the model, how its tokens are sampled, how prompts are pruned."""

    model: str
    min_tokens: Integer | None = _told(minimum=0)
    temperature: float | None = _told(minimum=0, maximum=2)
    top_p: float | None = _told(exclusiveMinimum=0, maximum=1)
    top_k: Integer | None = _told(minimum=-1)
    min_p: float | None = _told(minimum=0, maximum=1)
    seed: Integer | None = _told(minimum=-1)
    stop_token_ids: list[Integer] | None = _told(maxItems=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = _told(minimum=-2, maximum=2)
    frequency_penalty: float | None = _told(minimum=-2, maximum=2)
    repetition_penalty: float | None = _told(exclusiveMinimum=0, maximum=10)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = _told(minLength=1, maxLength=MAX_CACHE_SALT_CHARS)
    winnow: WinnowOptions | None = None


class _Generation(WithoutEffect, StructuredOutput, Sampling):
    """Fields shared by completions and chat."""

    max_tokens: Integer | None = _told(minimum=1)
    stop: str | list[str] | None = None
    n: Integer | None = _told(minimum=1)
    stream_options: StreamOptions | None = None
    include_reasoning: bool | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Generation):
    # Text, token IDs, or a list of either; prompts.py distinguishes them and reports errors.
    prompt: Annotated[Any, WithJsonSchema({"anyOf": _PROMPTS})]
    max_tokens: Integer | None = _told(minimum=0)  # 0 only with echo
    logprobs: Integer | None = _told(minimum=0, maximum=MAX_LOGPROBS)
    echo: bool | None = None
    reasoning_effort: str | None = None  # without effect


class ChatRequest(_Generation, ChatParameters, ToolParameters):
    messages: list[ChatMessage] = Field(json_schema_extra={"minItems": 1})
    max_completion_tokens: Integer | None = _told(minimum=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = None


class TokenizeRequest(ChatParameters, ToolParameters):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Integer]
