"""Request body of /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from services.gateway.body import Body, Integer
from services.gateway.rest.bodies import Sampling, StreamOptions
from services.gateway.typed import Piece, Typed, kind_of, kind_tag, one_of


class ContentPart(Piece):
    """A piece of text."""

    type: str = one_of(
        *("input_text", "output_text", "reasoning_text", "summary_text", "text", "refusal")
    )
    text: str | None = None
    refusal: str | None = None
    # Of an answer that is sent back, or for caches of other services: without effect.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: Any = None


class _Item(Body):
    """Fields that items of an earlier answer have, without effect."""

    id: str | None = None
    status: str | None = None


class MessageItem(_Item, Typed):
    type: str | None = one_of("message", None)
    role: str = Field("", json_schema_extra={"enum": ["user", "assistant", "system", "developer"]})
    content: str | list[ContentPart] | None = None
    phase: str | None = None


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    caller: Any = None


class FunctionCallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]
    name: str | None = None
    caller: Any = None


class ReasoningItem(_Item):
    """encrypted_content: another service's, without effect."""

    type: Literal["reasoning"]
    summary: list[ContentPart] | None = None
    content: list[ContentPart] | None = None
    encrypted_content: str | None = None


InputItem = Annotated[
    Annotated[MessageItem, Tag(kind_tag())]
    | Annotated[FunctionCallItem, Tag(kind_tag("function_call"))]
    | Annotated[FunctionCallOutputItem, Tag(kind_tag("function_call_output"))]
    | Annotated[ReasoningItem, Tag(kind_tag("reasoning"))],
    Discriminator(kind_of("function_call", "function_call_output", "reasoning")),
]


class FunctionTool(Typed):
    type: str = one_of("function")
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    # Without effect: every tool is shown to the model, which calls it directly.
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class TextConfig(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None  # without effect


class ResponsesRequest(Sampling):
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(None, json_schema_extra={"minimum": 1})
    stop: str | list[str] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    structured_outputs: dict[str, Any] | None = None
    top_logprobs: Integer | None = Field(None, json_schema_extra={"minimum": 0})
    include: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None  # all but its effort is without effect
    # Without effect.
    client_metadata: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    priority: Integer | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
