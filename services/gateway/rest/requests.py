"""Conversion of OpenAI API request bodies to a GenerationRequest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.settings import Settings
from services.gateway.access.request_limits import RequestLimits
from services.gateway.body import validate
from services.gateway.chat import chat_options, plain_messages
from services.gateway.enforced import enforced
from services.gateway.request.request import (
    GenerationRequest,
    Prompt,
    RequestOptions,
    checked_request,
)
from services.gateway.rest.bodies import (
    ChatRequest,
    CompletionRequest,
    StreamOptions,
)
from services.gateway.rest.prompts import read_prompts
from services.gateway.rest.unsupported import (
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    without_unsupported,
)
from services.gateway.structured import read_grammar
from services.gateway.tools import answer_format, chat_text, read_tools
from winnow.adapters.ref import AdapterRef
from winnow.answers import AnswerFormat
from winnow.errors import InvalidRequest, InvalidSetting
from winnow.grammar import Grammar
from winnow.grammar.compiler import GrammarCompiler
from winnow.sampling_params import MAX_LOGPROBS
from winnow.tokenizer import Tokenizer

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for text completions; chat has none
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
)


# vLLM's meaning of -1: no such filter, a random seed.
_AT_MINUS_ONE: Mapping[str, int | None] = {"top_k": 0, "seed": None}


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A GenerationRequest, and how to deliver its answer.

    continuous_usage: every chunk contains the usage so far.
    top_logprobs: number of likely tokens to list for each generated one; None: no logprobs.
    """

    generation: GenerationRequest
    stream: bool
    include_usage: bool
    continuous_usage: bool
    top_logprobs: int | None


class RequestReader:
    """Parses requests of one service. Tokenizing is slow: call it from a worker thread."""

    def __init__(
        self,
        settings: Settings,
        limits: RequestLimits,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._tokenizer = tokenizer
        self._grammars = grammars

    def completion(self, body: Mapping[str, Any]) -> OpenAIRequest:
        """A request for text completions.  Raises InvalidRequest or a subclass."""
        request = validate(CompletionRequest, without_unsupported(body, COMPLETION_PARAMETERS))
        adapter = self._limits.require_model(request.model)
        _require_logprobs("logprobs", request.logprobs)
        prompts = read_prompts(request.prompt, self._limits, self._settings.max_prompts_per_request)
        options = _options(
            request,
            max_tokens=request.max_tokens,
            max_tokens_param="max_tokens",
            default_max_tokens=COMPLETION_MAX_TOKENS,
            echo=bool(request.echo),
            num_logprobs=request.logprobs,
            grammar=enforced(read_grammar(request), grammars=self._grammars),
            adapter=adapter,
        )
        generation = checked_request("cmpl-", prompts, options, self._limits, self._tokenizer)
        return _delivered(request, generation, request.logprobs)

    def chat(self, body: Mapping[str, Any], id_prefix: str = "chatcmpl-") -> OpenAIRequest:
        """A request for a chat completion.  Raises InvalidRequest or a subclass."""
        request = validate(ChatRequest, without_unsupported(body, CHAT_PARAMETERS))
        adapter = self._limits.require_model(request.model)
        top_logprobs = _chat_logprobs(request)
        tools = read_tools(request, parallel=request.parallel_tool_calls)
        messages, chat = plain_messages(request.messages), chat_options(request)
        text = chat_text(self._tokenizer, messages, chat, tools, self._settings)
        answer = answer_format(
            tools,
            text,
            self._settings,
            self._tokenizer,
            include_reasoning=request.include_reasoning,
        )
        token_ids = self._limits.encode(text, "messages", add_special_tokens=False)
        options = _options(
            request,
            max_tokens=_chat_max_tokens(request),
            max_tokens_param=(
                "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            ),
            default_max_tokens=None,
            echo=False,
            num_logprobs=top_logprobs,
            grammar=enforced(
                read_grammar(request), tools, answer, self._tokenizer, grammars=self._grammars
            ),
            answer=answer,
            adapter=adapter,
        )
        generation = checked_request(
            id_prefix, [Prompt(token_ids)], options, self._limits, self._tokenizer
        )
        return _delivered(request, generation, top_logprobs)


def _chat_max_tokens(request: ChatRequest) -> int | None:
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidSetting(
            f"max_tokens is {old:,} and max_completion_tokens is {new:,}; give one",
            param="max_tokens",
        )
    return old if new is None else new


def _chat_logprobs(request: ChatRequest) -> int | None:
    _require_logprobs("top_logprobs", request.top_logprobs)
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidSetting(
            f"top_logprobs is {request.top_logprobs}, but logprobs is not true",
            param="top_logprobs",
        )
    return None


def _require_logprobs(name: str, number: int | None) -> None:
    if number is not None and not 0 <= number <= MAX_LOGPROBS:
        raise InvalidSetting(
            f"{name} is {number:,}; the allowed range is 0 to {MAX_LOGPROBS}", param=name
        )


def _options(
    request: CompletionRequest | ChatRequest,
    *,
    max_tokens: int | None,
    max_tokens_param: str,
    default_max_tokens: int | None,
    echo: bool,
    num_logprobs: int | None,
    grammar: Grammar | None,
    answer: AnswerFormat | None = None,
    adapter: AdapterRef | None = None,
) -> RequestOptions:
    sampling = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
    sampling |= {name: value for name, value in _AT_MINUS_ONE.items() if sampling[name] == -1}
    stop = request.stop or []
    return RequestOptions(
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=default_max_tokens,
        n=request.n,
        stop=[stop] if isinstance(stop, str) else stop,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        echo=echo,
        sampling={
            **sampling,
            "logit_bias": _logit_bias(request.logit_bias),
            "num_logprobs": num_logprobs,
            "stop_token_ids": request.stop_token_ids,
        },
        pruning=request.winnow.changes() if request.winnow else {},
        task=request.winnow.task if request.winnow else None,
        verify=bool(request.winnow and request.winnow.verify),
        cache_salt=request.cache_salt,
        grammar=grammar,
        answer=answer,
        explains=bool(request.winnow and request.winnow.explain),
        model_name=request.model,
        adapter=adapter,
    )


def _logit_bias(biases: Mapping[str, float] | None) -> dict[int, float] | None:
    """Biases by token ID; JSON keys are strings.  Raises InvalidSetting for an invalid ID."""
    if biases is None:
        return None
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidSetting(
                f"logit_bias has key {key!r}, which is no token id", param="logit_bias"
            )
    return {int(key): bias for key, bias in biases.items()}


def _delivered(
    request: CompletionRequest | ChatRequest,
    generation: GenerationRequest,
    top_logprobs: int | None,
) -> OpenAIRequest:
    options = request.stream_options or StreamOptions()
    asks_for_usage = bool(options.include_usage or options.continuous_usage_stats)
    if asks_for_usage and not request.stream:
        raise InvalidRequest(
            "stream_options is only allowed when stream is true", param="stream_options"
        )
    in_usage = {"verify": generation.verified_by is not None, "explain": generation.explains}
    for name, is_asked in in_usage.items():
        if request.stream and is_asked and not options.include_usage:
            raise InvalidRequest(
                f"what {name} finds is in the usage: a stream needs stream_options.include_usage",
                param=f"winnow.{name}",
            )
    return OpenAIRequest(
        generation=generation,
        stream=bool(request.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        top_logprobs=top_logprobs,
    )
