"""The part of /openapi.json about the APIs whose requests are read as chats."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from services.gateway.rest.messages_bodies import CountTokensRequest, MessagesRequest
from services.gateway.rest.openapi import (
    ChosenTokenLogprob,
    Operation,
    Problem,
    PromptTokensDetails,
    SummedUsage,
)
from services.gateway.rest.responses_bodies import ResponsesRequest

_Status = Literal["completed", "incomplete"]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class OutputText(_Sent):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChosenTokenLogprob]


class ReasoningText(_Sent):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(_Sent):
    id: str
    type: Literal["message"]
    status: _Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(_Sent):
    id: str
    type: Literal["reasoning"]
    status: _Status
    summary: list[None]
    content: list[ReasoningText]
    encrypted_content: None


class OutputFunctionCall(_Sent):
    id: str
    type: Literal["function_call"]
    status: _Status
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(PromptTokensDetails):
    cache_write_tokens: int


class OutputTokensDetails(_Sent):
    reasoning_tokens: int


class ResponseUsage(_Sent):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    winnow: SummedUsage


class IncompleteDetails(_Sent):
    reason: Literal["max_output_tokens"]


class ReasoningAsGiven(_Sent):
    effort: str | None
    summary: None


class TextFormat(_Sent):
    format: dict[str, Any]


class ToolAsGiven(_Sent):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ResponseObject(_Sent):
    """What is null or constant here is so in every response of this service."""

    id: str
    object: Literal["response"]
    created_at: int
    status: _Status
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputFunctionCall]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ReasoningAsGiven
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: TextFormat
    tool_choice: str | dict[str, Any]
    tools: list[ToolAsGiven]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str | None


class MessageText(_Sent):
    type: Literal["text"]
    text: str
    citations: None


class MessageThinking(_Sent):
    type: Literal["thinking"]
    thinking: str
    signature: str


class MessageToolUse(_Sent):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(_Sent):
    thinking_tokens: int


class MessageUsage(_Sent):
    """input_tokens: those that were not cached."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    winnow: SummedUsage


class MessageObject(_Sent):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageText | MessageThinking | MessageToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(_Sent):
    input_tokens: int


class MessagesError(_Sent):
    type: Literal["error"]
    error: Problem
    request_id: str | None


TRANSLATED_OPERATIONS = (
    Operation(
        "/v1/responses", "Answer, without state", ResponsesRequest, ResponseObject, streams=True
    ),
    Operation(
        *("/v1/messages", "Answer in Anthropic's form", MessagesRequest, MessageObject),
        streams=True,
        error=MessagesError,
    ),
    Operation(
        *("/v1/messages/count_tokens", "The tokens of a message", CountTokensRequest, TokenCount),
        error=MessagesError,
    ),
)
