"""Request bodies of /v1/messages and /v1/messages/count_tokens."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from services.gateway.body import Body, Integer
from services.gateway.rest.bodies import Sampling
from services.gateway.typed import Piece, Typed, kind_of, kind_tag, one_of


class _Block(Body):
    """cache_control: without effect, here and elsewhere."""

    cache_control: Any = None


class TextBlock(_Block, Piece):
    type: str = one_of("text")
    text: str | None = None
    citations: list[Any] | None = None  # of an earlier answer


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None  # told if the content is empty


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block):
    """What another service has thought and hidden; it cannot be read here."""

    type: Literal["redacted_thinking"]
    data: str | None = None


Block = Annotated[
    Annotated[TextBlock, Tag(kind_tag())]
    | Annotated[ToolUseBlock, Tag(kind_tag("tool_use"))]
    | Annotated[ToolResultBlock, Tag(kind_tag("tool_result"))]
    | Annotated[ThinkingBlock, Tag(kind_tag("thinking"))]
    | Annotated[RedactedThinkingBlock, Tag(kind_tag("redacted_thinking"))],
    Discriminator(kind_of("tool_use", "tool_result", "thinking", "redacted_thinking")),
]


class Turn(Body):
    role: str = Field(json_schema_extra={"enum": ["user", "assistant", "system"]})
    content: str | list[Block]
    cache_control: Any = None


class ClientTool(Typed):
    type: str | None = one_of("custom", None)
    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Any = None
    # Without effect: every tool is shown to the model, which calls it directly.
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None


class ToolChoice(Body):
    type: str = Field(json_schema_extra={"enum": ["auto", "any", "tool", "none"]})
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """budget_tokens: without effect."""

    type: str = Field(
        json_schema_extra={"enum": ["enabled", "disabled", "adaptive", "between_tools"]}
    )
    budget_tokens: Integer | None = None
    display: str | None = None


class OutputConfig(Body):
    format: dict[str, Any] | None = None
    effort: str | None = None  # without effect


class _Prompt(Sampling):
    messages: list[Turn] = Field(json_schema_extra={"minItems": 1})
    system: str | list[TextBlock] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Without effect.
    cache_control: Any = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    speed: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(_Prompt):
    max_tokens: Integer = Field(json_schema_extra={"minimum": 1})
    stop_sequences: list[str] | None = None


class CountTokensRequest(_Prompt):
    max_tokens: Integer | None = None  # without effect
    stop_sequences: list[str] | None = None  # without effect
