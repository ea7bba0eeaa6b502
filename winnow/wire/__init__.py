"""KV transfer format: encodes KV caches as frames and decodes them.

A transfer is a header, then for each layer in order a manifest and data frames, then a trailer
(PushFrame of proto/winnow/v1/decode.proto). Its digest is the SHA-256 of, in frame order: for the
header and each manifest, the field number (1 byte), the length (uint32) and the serialized message;
for each data frame, layer_idx (uint32), offset (uint64), payload length (uint32) and crc32
(uint32); then the bytes of `final_hidden`; then `report` and, if set, `sequence`, serialized
deterministically. All numbers are little-endian.

Prefill's transfers and migrations use the same format. A transfer of a running sequence has the
sequence's index in its header, and its state in the trailer (`sequence`).
"""

from winnow.wire.decoder import Expected, Trailer, TransferDecoder
from winnow.wire.encoder import FRAME_BYTES, TransferEncoder
from winnow.wire.framing import MAX_FRAME_BYTES, MAX_PAYLOAD_BYTES
from winnow.wire.grant import WIRE_VERSIONS, Grant, Ticket, newest_common
from winnow.wire.incoming import ReceiveBuffer
from winnow.wire.messages import (
    Header,
    read_header,
    report_from_proto,
    report_to_proto,
)

__all__ = [
    "FRAME_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_PAYLOAD_BYTES",
    "WIRE_VERSIONS",
    "Expected",
    "Grant",
    "Header",
    "ReceiveBuffer",
    "Ticket",
    "Trailer",
    "TransferDecoder",
    "TransferEncoder",
    "newest_common",
    "read_header",
    "report_from_proto",
    "report_to_proto",
]
