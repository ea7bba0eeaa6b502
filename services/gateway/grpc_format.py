"""Answers as messages of proto/winnow/v1/inference.proto."""

from dataclasses import asdict

from services.gateway.choices import Delta
from services.gateway.logprobs import token_text
from services.gateway.usage import Usage
from winnow.request import Token
from winnow.tokenizer import Tokenizer
from winnow.v1 import inference_pb2 as pb


def delta_to_proto(delta: Delta, request_id: str, tokenizer: Tokenizer) -> pb.CompleteResponse:
    """The chunk that streams `delta`."""
    logprobs = [_logprob(token, tokenizer) for token in delta.tokens if token.logprobs]
    choice = pb.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        token_ids=[token.token_id for token in delta.tokens],
        logprobs=logprobs,
        finish_reason=delta.finish_reason,
        stop_string=delta.stop_reason if isinstance(delta.stop_reason, str) else None,
        stop_token_id=delta.stop_reason if isinstance(delta.stop_reason, int) else None,
    )
    return pb.CompleteResponse(id=request_id, choices=[choice])


def usage_to_proto(usage: Usage, request_id: str) -> pb.CompleteResponse:
    """The last chunk."""
    message = pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        winnow=pb.WinnowUsage(**asdict(usage.winnow())),
    )
    return pb.CompleteResponse(id=request_id, usage=message)


def _logprob(token: Token, tokenizer: Tokenizer) -> pb.TokenLogprob:
    assert token.logprobs is not None
    return pb.TokenLogprob(
        token=token_text(tokenizer, token.token_id),
        logprob=token.logprobs.logprob,
        top=[
            pb.TokenLogprob(token=token_text(tokenizer, token_id), logprob=logprob)
            for token_id, logprob in token.logprobs.top
        ],
    )
