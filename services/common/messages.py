"""Winnow's dataclasses as messages of proto/winnow/v1/decode.proto, and back."""

from collections.abc import Iterable
from dataclasses import asdict, fields

from winnow.pruning_settings import Recompression
from winnow.sampling_params import SamplingParams
from winnow.tokens import FinishReason, Token, TokenLogprobs
from winnow.v1 import decode_pb2 as pb
from winnow.wire import report_from_proto, report_to_proto

__all__ = [
    "recompression_from_proto",
    "recompression_to_proto",
    "report_from_proto",
    "report_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "tokens_from_proto",
    "tokens_to_proto",
]

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_REASONS = {number: reason for reason, number in _FINISH.items()}


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        num_logprobs=params.num_logprobs,
        ignore_eos=params.ignore_eos,
        stop_token_ids=sorted(params.stop_token_ids),
        min_tokens=params.min_tokens,
    )


def sampling_from_proto(params: pb.SamplingParams) -> SamplingParams:
    """Raises InvalidSetting for a value out of range."""
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        num_logprobs=params.num_logprobs if params.HasField("num_logprobs") else None,
        ignore_eos=params.ignore_eos,
        stop_token_ids=frozenset(params.stop_token_ids),
        min_tokens=params.min_tokens,
    )


def recompression_to_proto(settings: Recompression) -> pb.Recompression:
    """The message's fields are those of the dataclass."""
    return pb.Recompression(**asdict(settings))


def recompression_from_proto(message: pb.Recompression) -> Recompression:
    """Raises InvalidSetting for a value out of range."""
    given = {
        field.name: getattr(message, field.name)
        for field in fields(Recompression)
        if field.type != int | None or message.HasField(field.name)
    }
    return Recompression(**given | {"method": message.method or "snapkv"})


def tokens_to_proto(tokens: Iterable[Token], recompressed_entries: int) -> pb.Tokens:
    """What one engine step gave a request."""
    return pb.Tokens(
        tokens=[_token_to_proto(token) for token in tokens],
        recompressed_entries=recompressed_entries,
    )


def tokens_from_proto(tokens: pb.Tokens) -> list[Token]:
    return [_token_from_proto(token) for token in tokens.tokens]


def _token_to_proto(token: Token) -> pb.Token:
    logprobs = token.logprobs
    return pb.Token(
        sequence_idx=token.sequence_idx,
        token_id=token.token_id,
        logprob=None if logprobs is None else logprobs.logprob,
        top_logprobs=[
            pb.TopLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in (logprobs.top if logprobs else ())
        ],
        finish_reason=_FINISH[token.finish_reason],
    )


def _token_from_proto(token: pb.Token) -> Token:
    logprobs = None
    if token.HasField("logprob"):
        top = tuple((one.token_id, one.logprob) for one in token.top_logprobs)
        logprobs = TokenLogprobs(token.logprob, top)
    return Token(
        sequence_idx=token.sequence_idx,
        token_id=token.token_id,
        logprobs=logprobs,
        finish_reason=_FINISH_REASONS[token.finish_reason],
    )
