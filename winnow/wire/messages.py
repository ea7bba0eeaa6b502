"""Protobuf conversion of a transfer's header, report and state, and the transfer's digest."""

import hashlib
import struct
from dataclasses import dataclass
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from winnow.errors import TransferMalformed, TransferMismatch
from winnow.kv import KvDtype, ModelShape, SequenceState
from winnow.report import PrefillReport
from winnow.v1 import decode_pb2 as pb
from winnow.wire.framing import Field, split_frame
from winnow.wire.grant import Ticket

MAX_HEADER_BYTES = 4096
MAX_REQUEST_ID_CHARS = 128
MAX_LAYERS = 1 << 14  # a shape takes memory for each of its layers

_DTYPES = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_FLOAT16: torch.float16,
}
_KV_DTYPES: dict[int, KvDtype] = {pb.CODEC_RAW: "auto", pb.CODEC_INT8: "int8"}
_CODECS = {"auto": pb.CODEC_RAW, "int8": pb.CODEC_INT8}
_DTYPE_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}

_Message = TypeVar("_Message", bound=Message)


@dataclass(frozen=True, slots=True)
class Header:
    """The request whose KV follows, and its format. attempt counts from 1.

    sequence_idx, sequences_left: for a migration, the sequence, and how many follow it.
    kv_dtype: of the keys and values that follow.
    heads: of a part, its KV heads; None: all.
    """

    request_id: str
    attempt: int
    ticket: Ticket
    fingerprint: str
    shape: ModelShape
    num_prompt_tokens: int
    sequence_idx: int = 0
    sequences_left: int = 0
    kv_dtype: KvDtype = "auto"
    heads: range | None = None

    @property
    def sent_shape(self) -> ModelShape:
        """`shape`, with the heads that follow."""
        return self.shape if self.heads is None else self.shape.part(len(self.heads))


class Digest:
    """SHA-256 digest of a transfer, as specified in winnow/wire/__init__.py."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add_message(self, field: Field, body: bytes) -> None:
        self._sha256.update(struct.pack("<BI", field, len(body)) + body)

    def add_data(self, layer_idx: int, offset: int, num_bytes: int, crc32: int) -> None:
        self._sha256.update(struct.pack("<IQII", layer_idx, offset, num_bytes, crc32))

    def finish(self, trailer: pb.TransferTrailer) -> bytes:
        """Add the trailer, without its digest field; returns the digest."""
        self._sha256.update(trailer.final_hidden)
        self._sha256.update(trailer.report.SerializeToString(deterministic=True))
        if trailer.HasField("sequence"):
            self._sha256.update(trailer.sequence.SerializeToString(deterministic=True))
        return self._sha256.digest()


def read_header(frame: bytes) -> Header:
    """Parse the header in a transfer's first frame; its values are not checked against a grant.

    Raises TransferMalformed for another frame, TransferMismatch for an unknown dtype or codec.
    """
    field, body = split_frame(frame)
    if field is not Field.HEADER:
        raise TransferMalformed(f"transfer starts with a frame of kind {field.name}")
    return header_from_bytes(bytes(body))


def header_from_bytes(body: bytes) -> Header:
    """Parse a serialized header; raises as `read_header`."""
    if len(body) > MAX_HEADER_BYTES:
        raise TransferMalformed(f"header has {len(body)} bytes; the limit is {MAX_HEADER_BYTES}")
    header = parse(pb.TransferHeader(), body)
    if not 1 <= len(header.request_id) <= MAX_REQUEST_ID_CHARS or header.attempt < 1:
        raise TransferMalformed("header names no request or no attempt")
    if header.dtype not in _DTYPES or header.codec not in _KV_DTYPES:
        raise TransferMismatch(f"dtype {header.dtype} or codec {header.codec} is unknown")
    if header.num_layers > MAX_LAYERS:
        raise TransferMismatch(
            f"model shape of the transfer has {header.num_layers} layers; the limit is {MAX_LAYERS}"
        )
    shape = ModelShape(
        header.num_layers,
        header.num_heads,
        header.num_kv_heads,
        header.head_dim,
        header.hidden_size,
        _DTYPES[header.dtype],
    )
    return Header(
        header.request_id,
        header.attempt,
        Ticket(header.wire_version, header.transfer_token),
        header.model_fingerprint,
        shape,
        header.num_prompt_tokens,
        header.sequence_idx,
        header.sequences_left,
        _KV_DTYPES[header.codec],
        _heads(header),
    )


def _heads(header: pb.TransferHeader) -> range | None:
    """Raises TransferMalformed for heads that the model does not have, or a first one of none."""
    first, count = header.first_kv_head, header.num_part_kv_heads
    if first + count > header.num_kv_heads or (first and not count):
        raise TransferMalformed(
            f"transfer is of {count} KV heads from head {first} on; the model has "
            f"{header.num_kv_heads}"
        )
    return range(first, first + count) if count else None


def header_to_bytes(header: Header) -> bytes:
    """Serialize a header."""
    shape = header.shape
    message = pb.TransferHeader(
        request_id=header.request_id,
        attempt=header.attempt,
        wire_version=header.ticket.wire_version,
        transfer_token=header.ticket.token,
        model_fingerprint=header.fingerprint,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        num_prompt_tokens=header.num_prompt_tokens,
        dtype=_DTYPE_NUMBERS[shape.dtype],
        codec=_CODECS[header.kv_dtype],
        sequence_idx=header.sequence_idx,
        sequences_left=header.sequences_left,
        first_kv_head=0 if header.heads is None else header.heads.start,
        num_part_kv_heads=0 if header.heads is None else len(header.heads),
    )
    return bytes(message.SerializeToString())


def parse(message: _Message, body: bytes) -> _Message:
    """Parse `body` into `message`; raises TransferMalformed if that fails."""
    try:
        message.MergeFromString(body)
    except DecodeError as error:
        raise TransferMalformed(f"{message.DESCRIPTOR.name} cannot be read: {error}") from error
    return message


def state_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> pb.StateTensor:
    """A tensor of a layer's state, as a manifest announces it."""
    return pb.StateTensor(dtype=_DTYPE_NUMBERS[dtype], sizes=shape)


def report_to_proto(report: PrefillReport) -> pb.PrefillReport:
    return pb.PrefillReport(
        num_prompt_tokens=report.num_prompt_tokens,
        num_selected_tokens=report.num_selected_tokens,
        next_position=report.next_position,
        selection_layer=report.selection_layer,
        no_selection_reason=report.no_selection_reason or "",
        rho=[pb.RankVariance(layer_idx=layer, value=value) for layer, value in report.rho],
        computed_share=report.computed_share,
        kv_bytes_full=report.kv_bytes_full,
        kv_bytes_kept=report.kv_bytes_kept,
        layer_entries=report.layer_entries,
        num_cached_tokens=report.num_cached_tokens,
        num_recomputed_tokens=report.num_recomputed_tokens,
        saved_layer_tokens=report.saved_layer_tokens,
        no_prefix_reason=report.no_prefix_reason or "",
        state_bytes=report.state_bytes,
    )


def report_from_proto(report: pb.PrefillReport) -> PrefillReport:
    selected = report.HasField("selection_layer")
    return PrefillReport(
        num_prompt_tokens=report.num_prompt_tokens,
        num_selected_tokens=report.num_selected_tokens,
        next_position=report.next_position,
        selection_layer=report.selection_layer if selected else None,
        no_selection_reason=report.no_selection_reason or None,
        rho=tuple((point.layer_idx, point.value) for point in report.rho),
        computed_share=report.computed_share,
        kv_bytes_full=report.kv_bytes_full,
        kv_bytes_kept=report.kv_bytes_kept,
        layer_entries=tuple(report.layer_entries),
        num_cached_tokens=report.num_cached_tokens,
        num_recomputed_tokens=report.num_recomputed_tokens,
        saved_layer_tokens=report.saved_layer_tokens,
        no_prefix_reason=report.no_prefix_reason or None,
        state_bytes=report.state_bytes,
    )


def state_to_proto(state: SequenceState) -> pb.SequenceState:
    return pb.SequenceState(
        token_ids=state.token_ids,
        next_position=state.next_position,
        recompressed_entries=state.recompressed_entries,
        at_floor=state.at_floor,
    )


def state_from_proto(state: pb.SequenceState) -> SequenceState:
    return SequenceState(
        token_ids=tuple(state.token_ids),
        next_position=state.next_position,
        recompressed_entries=state.recompressed_entries,
        at_floor=state.at_floor,
    )
