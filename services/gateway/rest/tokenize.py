"""/tokenize and /detokenize: convert between text and tokens with the service's tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.body import validate
from services.gateway.chat import chat_options, plain_messages
from services.gateway.gateway import Gateway
from services.gateway.logprobs import token_text
from services.gateway.rest.bodies import DetokenizeRequest, TokenizeRequest
from services.gateway.tools import chat_text, read_tools
from winnow.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Translation:
    """The response, and the number of tokens produced or read."""

    answer: dict[str, Any]
    num_tokens: int


def tokenize(gateway: Gateway, body: Mapping[str, Any]) -> Translation:
    """The tokens of `prompt`, or of `messages` in the chat template.  Raises as a completion does.

    return_token_strs: add each token's text, and where control tokens are.
    """
    request = validate(TokenizeRequest, body)
    if request.model is not None:
        gateway.limits.require_model(request.model)
    tokens = _tokens(gateway, request)
    texts, special = None, None
    if request.return_token_strs:
        tokenizer = gateway.model.tokenizer
        control = tokenizer.control_token_ids
        texts = [token_text(tokenizer, token_id) for token_id in tokens]
        special = [idx for idx, token_id in enumerate(tokens) if token_id in control]
    answer = {
        "count": len(tokens),
        "max_model_len": gateway.limits.max_positions,
        "tokens": tokens,
        "token_strs": texts,
        "special": special,
    }
    return Translation(answer, len(tokens))


def _tokens(gateway: Gateway, request: TokenizeRequest) -> Sequence[int]:
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    tools = read_tools(request, parallel=None)  # wrong ones are refused beside a prompt too
    if request.messages is not None:
        messages, options = plain_messages(request.messages), chat_options(request)
        text = chat_text(gateway.model.tokenizer, messages, options, tools, gateway.settings)
        return gateway.limits.encode(text, "messages", add_special_tokens=False)
    if not request.prompt:  # invalid in a completion, but has tokens here: none, or special ones
        return gateway.model.tokenizer.encode("", add_special_tokens=_has_special(request))
    return gateway.limits.encode(request.prompt, "prompt", add_special_tokens=_has_special(request))


def _has_special(request: TokenizeRequest) -> bool:
    return request.add_special_tokens is not False


def detokenize(gateway: Gateway, body: Mapping[str, Any]) -> Translation:
    """The text of `tokens`, including control tokens; at most as many as fit into the model."""
    request = validate(DetokenizeRequest, body)
    limits = gateway.limits
    if request.model is not None:
        limits.require_model(request.model)
    limits.require_positions(len(request.tokens), "tokens")
    limits.require_token_ids(request.tokens, "tokens")
    text = gateway.model.tokenizer.decode(request.tokens)
    return Translation({"prompt": text}, len(request.tokens))
