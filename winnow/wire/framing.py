"""Hand-written protobuf encoding of PushFrame, without copying payloads in and out of messages.

Byte-compatible with proto/winnow/v1/decode.proto. A frame has exactly one field, a message. Parsing
is strict: a frame with any unaccounted byte is refused.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from winnow.errors import TransferDamaged, TransferMalformed

MAX_PAYLOAD_BYTES = 4 << 20
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + 64  # tags, lengths, offset and checksum


class Field(IntEnum):
    """PushFrame's field numbers: the kind of message in a frame."""

    HEADER = 1
    LAYER = 2
    DATA = 3
    TRAILER = 4


_LENGTH_DELIMITED = 2
_FIELDS = {field << 3 | _LENGTH_DELIMITED: field for field in Field}
_MAX_VARINT_BYTES = 10
_LAYER_IDX_TAG, _OFFSET_TAG, _CRC32_TAG, _PAYLOAD_TAG = 0x08, 0x10, 0x1D, 0x22
_CRC32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class DataFrame:
    """A piece of a layer's payload, checksum verified; `payload` is a view of the frame."""

    layer_idx: int
    offset: int
    crc32: int
    payload: memoryview


def join_frame(field: Field, body: bytes) -> bytes:
    """Encode a PushFrame whose `field` is the serialized message `body`."""
    return b"".join((_varint(field << 3 | _LENGTH_DELIMITED), _varint(len(body)), body))


def join_data_frame(
    layer_idx: int, offset: int, pieces: Sequence[memoryview]
) -> tuple[bytes, int, int]:
    """Encode a PushFrame with a DataFrame of `pieces`: (frame, payload length, CRC-32)."""
    crc32, num_bytes = 0, 0
    for piece in pieces:
        crc32 = zlib.crc32(piece, crc32)
        num_bytes += len(piece)
    start = b"".join(
        (
            bytes((_LAYER_IDX_TAG,)) + _varint(layer_idx),
            bytes((_OFFSET_TAG,)) + _varint(offset),
            bytes((_CRC32_TAG,)) + _CRC32.pack(crc32),
            bytes((_PAYLOAD_TAG,)) + _varint(num_bytes),
        )
    )
    outer = _varint(Field.DATA << 3 | _LENGTH_DELIMITED) + _varint(len(start) + num_bytes)
    return b"".join((outer, start, *pieces)), num_bytes, crc32


def split_frame(frame: bytes) -> tuple[Field, memoryview]:
    """Parse a frame: its field number, and a view of that field's message.

    Raises TransferMalformed unless the frame is one known field and nothing else.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise TransferMalformed(f"frame has {len(frame)} bytes; the limit is {MAX_FRAME_BYTES}")
    view = memoryview(frame)
    tag, start = _read_varint(view, 0)
    num_bytes, start = _read_varint(view, start)
    if tag not in _FIELDS:
        raise TransferMalformed(f"frame starts with unknown tag {tag}")
    if start + num_bytes != len(view):
        raise TransferMalformed(
            f"frame announces {num_bytes} bytes; {len(view) - start} bytes follow"
        )
    return _FIELDS[tag], view[start:]


def read_data_frame(body: memoryview) -> DataFrame:
    """Parse the DataFrame in `body` and verify its checksum.

    Raises TransferMalformed for anything else, TransferDamaged for a wrong checksum.
    """
    fields = dict.fromkeys((_LAYER_IDX_TAG, _OFFSET_TAG, _CRC32_TAG), 0)
    payload = body[:0]
    for tag, value in _data_fields(body):
        if isinstance(value, memoryview):
            payload = value
        else:
            fields[tag] = value
    frame = DataFrame(fields[_LAYER_IDX_TAG], fields[_OFFSET_TAG], fields[_CRC32_TAG], payload)
    if not 1 <= len(payload) <= MAX_PAYLOAD_BYTES:
        raise TransferMalformed(
            f"payload has {len(payload)} bytes; allowed are 1 to {MAX_PAYLOAD_BYTES}"
        )
    if zlib.crc32(payload) != frame.crc32:
        raise TransferDamaged(
            f"checksum of layer {frame.layer_idx} at byte {frame.offset} does not match"
        )
    return frame


def _data_fields(body: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(body):
        tag, at = _read_varint(body, at)
        if tag in (_LAYER_IDX_TAG, _OFFSET_TAG):
            value, at = _read_varint(body, at)
            yield tag, value
        elif tag == _CRC32_TAG:
            start, at = at, _end(body, at, _CRC32.size)
            yield tag, _CRC32.unpack(body[start:at])[0]
        elif tag == _PAYLOAD_TAG:
            num_bytes, start = _read_varint(body, at)
            at = _end(body, start, num_bytes)
            yield tag, body[start:at]
        else:
            raise TransferMalformed(f"data frame has unknown tag {tag}")


def _end(body: memoryview, start: int, num_bytes: int) -> int:
    if start + num_bytes > len(body):
        raise TransferMalformed(
            f"data frame announces {num_bytes} bytes; {len(body) - start} bytes follow"
        )
    return start + num_bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, start: int) -> tuple[int, int]:
    """The number at `start` and the index after it."""
    value = 0
    for idx, byte in enumerate(view[start : start + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * idx
        if byte < 0x80:
            return value, start + idx + 1
    raise TransferMalformed("frame ends inside a number")
