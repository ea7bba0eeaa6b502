"""Conversion of deltas and usage to messages of proto/winnow/v1/inference.proto."""

from collections.abc import Iterator
from dataclasses import asdict

from services.gateway.logprobs import token_text
from services.gateway.request.choices import Delta
from services.gateway.usage import RequestUsage
from winnow.tokenizer import Tokenizer
from winnow.tokens import Token
from winnow.v1 import inference_pb2 as pb

# With 20 top tokens each, under 1 MiB: gRPC clients accept 4 MiB by default.
_PROMPT_TOKENS_PER_CHUNK = 1024


def delta_to_proto(
    delta: Delta, request_id: str, tokenizer: Tokenizer
) -> Iterator[pb.CompleteResponse]:
    """The chunks for one delta: first the prompt's tokens with log-probabilities, if any."""
    for start in range(0, len(delta.prompt), _PROMPT_TOKENS_PER_CHUNK):
        tokens = delta.prompt[start : start + _PROMPT_TOKENS_PER_CHUNK]
        prompt_logprobs = [_logprob(token, tokenizer) for token in tokens]
        choice = pb.ChoiceDelta(index=delta.index, prompt_logprobs=prompt_logprobs)
        yield pb.CompleteResponse(id=request_id, choices=[choice])
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
    yield pb.CompleteResponse(id=request_id, choices=[choice])


def usage_to_proto(usage: RequestUsage, request_id: str) -> pb.CompleteResponse:
    """The last chunk of a stream."""
    message = pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        winnow=pb.WinnowUsage(
            **asdict(usage.winnow()),
            verify=None if usage.verify is None else pb.Verification(**asdict(usage.verify)),
        ),
    )
    return pb.CompleteResponse(id=request_id, usage=message)


def _logprob(token: Token, tokenizer: Tokenizer) -> pb.TokenLogprob:
    text, logprobs = token_text(tokenizer, token.token_id), token.logprobs
    if logprobs is None:
        return pb.TokenLogprob(token=text)
    top = [
        pb.TokenLogprob(token=token_text(tokenizer, token_id), logprob=logprob)
        for token_id, logprob in logprobs.top
    ]
    return pb.TokenLogprob(token=text, logprob=logprobs.logprob, top=top)
