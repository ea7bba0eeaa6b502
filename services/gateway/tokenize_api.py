"""/tokenize and /detokenize: how the service splits a text, and joins tokens."""

from collections.abc import Mapping
from typing import Any

from services.gateway.chat import plain_messages
from services.gateway.gateway import Gateway
from services.gateway.openai_types import DetokenizeRequest, TokenizeRequest, validate
from winnow.errors import InvalidRequest


def tokenize(gateway: Gateway, body: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of a `prompt`, or of `messages` in the chat template."""
    request = validate(TokenizeRequest, body)
    if request.model is not None:
        gateway.limits.require_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    tokenizer = gateway.model.tokenizer
    if request.messages is not None:
        tokens = tokenizer.render_chat(plain_messages(request.messages))
    else:
        special = request.add_special_tokens is not False
        tokens = tokenizer.encode(request.prompt or "", add_special_tokens=special)
    return {
        "count": len(tokens),
        "max_model_len": gateway.limits.max_positions,
        "tokens": tokens,
    }


def detokenize(gateway: Gateway, body: Mapping[str, Any]) -> dict[str, str]:
    """The text of `tokens`, control tokens included."""
    request = validate(DetokenizeRequest, body)
    if request.model is not None:
        gateway.limits.require_model(request.model)
    gateway.limits.require_token_ids(request.tokens, "tokens")
    return {"prompt": gateway.model.tokenizer.decode(request.tokens)}
