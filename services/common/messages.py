"""Conversion of Winnow's dataclasses to and from messages of proto/winnow/v1/decode.proto."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from google.protobuf.message import Message

from winnow.adapters.ref import AdapterRef
from winnow.errors import InvalidGrammar
from winnow.grammar import Grammar
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
    """The message has the same fields as the dataclass."""
    given = {field.name: getattr(params, field.name) for field in fields(params)}
    return pb.SamplingParams(**given | {"stop_token_ids": sorted(params.stop_token_ids)})


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Raises InvalidSetting for a value out of range."""
    given = _given(message, SamplingParams)
    given["logit_bias"] = dict(message.logit_bias)
    given["stop_token_ids"] = frozenset(message.stop_token_ids)
    return SamplingParams(**given)


def recompression_to_proto(settings: Recompression) -> pb.Recompression:
    """The message has the same fields as the dataclass."""
    return pb.Recompression(**asdict(settings))


def recompression_from_proto(message: pb.Recompression) -> Recompression:
    """Raises InvalidSetting for a value out of range."""
    given = _given(message, Recompression)
    return Recompression(**given | {"method": message.method or "snapkv"})


def _given(message: Message, cls: type[SamplingParams | Recompression]) -> dict[str, Any]:
    """Values in `message` for the fields of `cls`; unset fields that may be None are left out."""
    return {
        field.name: getattr(message, field.name)
        for field in fields(cls)
        if field.type != int | None or message.HasField(field.name)
    }


def adapter_to_proto(adapter: AdapterRef) -> pb.Adapter:
    return pb.Adapter(name=adapter.name, digest=adapter.digest, folder=adapter.folder)


def adapter_from_proto(message: pb.Adapter) -> AdapterRef:
    return AdapterRef(message.name, message.digest, message.folder)


def grammar_to_proto(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(
        **{grammar.kind: grammar.source}, control_token_ids=sorted(grammar.control_token_ids)
    )


def grammar_from_proto(message: pb.Grammar) -> Grammar:
    """Raises InvalidGrammar for a message without a source, such as one of a newer release."""
    kind = message.WhichOneof("source")
    if kind is None:
        raise InvalidGrammar("the grammar is of no kind that is known here", param="grammar")
    return Grammar(kind, getattr(message, kind), frozenset(message.control_token_ids))


def tokens_to_proto(tokens: Iterable[Token], recompressed_entries: int) -> pb.Tokens:
    """The tokens one engine step generated for a request."""
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
