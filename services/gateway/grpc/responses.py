"""Conversion of deltas and usage to messages of proto/winnow/v1/inference.proto."""

import math
from collections.abc import Iterator
from dataclasses import asdict

from services.gateway.logprobs import token_text
from services.gateway.request.choices import Delta
from services.gateway.usage import Explanation, RequestUsage
from winnow.answers.parts import CallArguments, CallStart, Part, ReasoningPart, TextPart
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
        text="".join(part.text for part in delta.parts if isinstance(part, TextPart)),
        reasoning="".join(part.text for part in delta.parts if isinstance(part, ReasoningPart)),
        tool_calls=[call for part in delta.parts for call in _call(part)],
        token_ids=[token.token_id for token in delta.tokens],
        logprobs=logprobs,
        finish_reason=delta.told_finish_reason,
        stop_string=delta.stop_reason if isinstance(delta.stop_reason, str) else None,
        stop_token_id=delta.stop_reason if isinstance(delta.stop_reason, int) else None,
    )
    yield pb.CompleteResponse(id=request_id, choices=[choice])


def _call(part: Part) -> Iterator[pb.ToolCallDelta]:
    if isinstance(part, CallStart):
        yield pb.ToolCallDelta(index=part.index, id=part.id, name=part.name)
    elif isinstance(part, CallArguments):
        yield pb.ToolCallDelta(index=part.index, arguments=part.text)


def usage_to_proto(usage: RequestUsage, request_id: str) -> pb.CompleteResponse:
    """The last chunk of a stream."""
    message = pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        winnow=pb.WinnowUsage(
            **asdict(usage.winnow()),
            verify=None if usage.verify is None else pb.Verification(**asdict(usage.verify)),
        ),
        explain=None if usage.explain is None else _explanation(usage.explain),
    )
    return pb.CompleteResponse(id=request_id, usage=message)


def _explanation(explanation: Explanation) -> pb.Explanation:
    told = explanation.to_json()
    told["scores"] = [math.nan if score is None else score for score in explanation.scores]
    return pb.Explanation(**told)


def _logprob(token: Token, tokenizer: Tokenizer) -> pb.TokenLogprob:
    text, logprobs = token_text(tokenizer, token.token_id), token.logprobs
    if logprobs is None:
        return pb.TokenLogprob(token=text)
    top = [
        pb.TokenLogprob(token=token_text(tokenizer, token_id), logprob=logprob)
        for token_id, logprob in logprobs.top
    ]
    return pb.TokenLogprob(token=text, logprob=logprobs.logprob, top=top)
