"""Conversion of a winnow.v1.Inference CompleteRequest to a GenerationRequest."""

from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from services.gateway.client_names import client_names
from services.gateway.enforced import enforced
from services.gateway.gateway import Gateway
from services.gateway.grpc.chat import grammar_of, messages_of, own_names, tools_of
from services.gateway.request.request import (
    GenerationRequest,
    Prompt,
    RequestOptions,
    checked_request,
)
from services.gateway.structured import AskedGrammar
from services.gateway.tools import answer_format, chat_text
from winnow.answers import AnswerFormat
from winnow.chat_template import ChatOptions
from winnow.errors import InvalidRequest, InvalidSetting
from winnow.grammar import Grammar
from winnow.marked_text import plain
from winnow.v1 import inference_pb2 as pb

# gRPC uses 0 for JSON's null, which keeps every entry.
_UNLIMITED_AT_ZERO = frozenset({"kv_budget", "decode_budget", "decode_floor"})
_NO_PRUNING = frozenset({"verify", "task", "explain"})


def parsed_bytes(body: bytes) -> pb.CompleteRequest:
    """The serialized message.  Raises InvalidRequest."""
    try:
        message: pb.CompleteRequest = pb.CompleteRequest.FromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"{len(body):,} bytes are no CompleteRequest") from error
    return message


def may_have_grammar(request: pb.CompleteRequest) -> bool:
    """Whether the answer may have to match a grammar."""
    enforces_calls = request.messages.tool_choice not in ("", "auto", "none")
    has_strict_tool = any(tool.strict for tool in request.messages.tools)
    return request.WhichOneof("grammar") is not None or enforces_calls or has_strict_tool


def request_from_proto(gateway: Gateway, request: pb.CompleteRequest) -> GenerationRequest:
    """The validated request. Tokenizing is slow: call it from a worker thread.

    Raises InvalidRequest or a subclass.
    """
    adapter = gateway.limits.require_model(request.model)
    asked = grammar_of(request)
    if request.WhichOneof("prompt") == "messages":
        with client_names(own_names(request.messages)):
            prompt, grammar, answer = _chat(gateway, request, asked)
    else:
        prompt, answer = _prompt(gateway, request), None
        grammar = enforced(asked, grammars=gateway.grammars)
    options = RequestOptions(
        max_tokens=_optional(request, "max_tokens"),
        max_tokens_param="max_tokens",
        default_max_tokens=None,
        n=request.n or None,
        stop=list(request.stop),
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=_optional(request, "skip_special_tokens"),
        echo=request.echo,
        sampling=_sampling(request),
        pruning=_pruning(request.winnow),
        task=_optional(request.winnow, "task"),
        verify=request.winnow.verify,
        cache_salt=_optional(request, "cache_salt"),
        grammar=grammar,
        answer=answer,
        explains=request.winnow.explain,
        model_name=request.model,
        adapter=adapter,
    )
    return checked_request("grpc-", [prompt], options, gateway.limits, gateway.model.tokenizer)


def _optional(message: Any, field: str) -> Any:  # noqa: ANN401 - generated code has no types
    return getattr(message, field) if message.HasField(field) else None


def _sampling(request: pb.CompleteRequest) -> dict[str, Any]:
    return {
        "temperature": _optional(request, "temperature"),
        "top_p": _optional(request, "top_p"),
        "top_k": _optional(request, "top_k"),
        "min_p": _optional(request, "min_p"),
        "seed": _optional(request, "seed"),
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": _optional(request, "repetition_penalty"),
        "logit_bias": dict(request.logit_bias),
        "num_logprobs": _optional(request, "logprobs"),
        "ignore_eos": request.ignore_eos,
        "stop_token_ids": list(request.stop_token_ids),
        "min_tokens": request.min_tokens,
    }


def _pruning(options: pb.WinnowOptions) -> dict[str, Any]:
    """The pruning settings that the request sets."""
    return {
        field.name: None if field.name in _UNLIMITED_AT_ZERO and value == 0 else value
        for field, value in options.ListFields()
        if field.name not in _NO_PRUNING
    }


def _prompt(gateway: Gateway, request: pb.CompleteRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return Prompt(gateway.limits.encode(request.text, "text"), request.text)
    if kind == "token_ids":
        token_ids = list(request.token_ids.ids)
        gateway.limits.require_prompt(len(token_ids), "token_ids")
        gateway.limits.require_token_ids(token_ids, "token_ids")
        return Prompt(token_ids)
    raise InvalidRequest("give a prompt: text, token_ids or messages", param="prompt")


def _chat(
    gateway: Gateway, request: pb.CompleteRequest, asked: AskedGrammar | None
) -> tuple[Prompt, Grammar | None, AnswerFormat | None]:
    """The prompt of a conversation, what its answers must match, and how they are split."""
    settings, tokenizer = gateway.settings, gateway.model.tokenizer
    tools = tools_of(request.messages)
    messages, options = messages_of(request.messages), _chat_options(request.messages)
    text = chat_text(tokenizer, messages, options, tools, settings)
    answer = answer_format(
        tools,
        text,
        settings,
        tokenizer,
        include_reasoning=_optional(request, "include_reasoning"),
    )
    grammar = enforced(asked, tools, answer, tokenizer, grammars=gateway.grammars)
    token_ids = gateway.limits.encode(text, "messages", add_special_tokens=False)
    return Prompt(token_ids, plain(text)), grammar, answer


def _chat_options(messages: pb.ChatMessages) -> ChatOptions:
    try:
        kwargs = MessageToDict(messages.chat_template_kwargs)
    except ValueError as error:
        raise InvalidSetting(
            "chat_template_kwargs has a number that is not finite", param="chat_template_kwargs"
        ) from error
    return ChatOptions(
        add_generation_prompt=_optional(messages, "add_generation_prompt"),
        continue_final_message=messages.continue_final_message,
        template_kwargs=_whole_numbers(kwargs),
    )


def _whole_numbers(value: Any) -> Any:  # noqa: ANN401 - what JSON can hold
    """Restore integers: a Struct stores 2 as 2.0."""
    if isinstance(value, dict):
        return {name: _whole_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
