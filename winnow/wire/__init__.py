"""One prompt's KV cache as frames, and back: the only code that turns tensors into bytes.

A transfer is a header, then for each layer in order a manifest and data frames, then a trailer
(PushFrame of proto/winnow/v1/decode.proto). Its digest is SHA-256 over, in the order of the
frames: of header and manifests the field number (1 byte), the length (uint32) and the serialized
message; of each data frame layer_idx (uint32), offset (uint64), payload length (uint32) and
crc32 (uint32); then the bytes of `final_hidden`; then those of `report`, and of `sequence` where
it is set, serialized deterministically. All numbers little-endian.

What prefill sends and what a worker gives away are alike; a transfer of a running sequence says
in its header which one it is, and in its trailer where it stands (`sequence`).
"""

from winnow.wire.decoder import Expected, Trailer, TransferDecoder
from winnow.wire.encoder import FRAME_BYTES, TransferEncoder
from winnow.wire.framing import MAX_FRAME_BYTES, MAX_PAYLOAD_BYTES
from winnow.wire.grant import FIRST_WITH_FETCH, WIRE_VERSIONS, Grant, Ticket, newest_common
from winnow.wire.incoming import ReceiveBuffer
from winnow.wire.messages import (
    Header,
    read_header,
    report_from_proto,
    report_to_proto,
)

__all__ = [
    "FIRST_WITH_FETCH",
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
