"""Encoder of KV transfers, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from winnow.kv import LayerKV, SequenceState
from winnow.report import PrefillReport
from winnow.v1 import decode_pb2 as pb
from winnow.wire.framing import MAX_PAYLOAD_BYTES, Field, join_data_frame, join_frame
from winnow.wire.messages import (
    Digest,
    Header,
    header_to_bytes,
    report_to_proto,
    state_tensor,
    state_to_proto,
)
from winnow.wire.payload import segments

FRAME_BYTES = 2 << 20


class TransferEncoder:
    """Encodes the transfer of one attempt: call `header`, each `layer` in order, then `trailer`.

    frame_bytes: payload per data frame, 1 byte to MAX_PAYLOAD_BYTES.
    """

    def __init__(self, header: Header, *, frame_bytes: int = FRAME_BYTES) -> None:
        assert 1 <= frame_bytes <= MAX_PAYLOAD_BYTES
        self._header = header
        self._frame_bytes = frame_bytes
        self._digest = Digest()

    def header(self) -> bytes:
        return self._message(Field.HEADER, header_to_bytes(self._header))

    def layer(self, kv: LayerKV) -> Iterator[bytes]:
        """The layer's manifest and data frames; each owns its bytes once it is yielded."""
        shape, window = self._header.sent_shape, kv.window_queries.shape[1]
        is_int8 = self._header.kv_dtype == "int8"
        kv = kv.quantized() if is_int8 else kv.dequantized(shape.dtype)
        manifest = pb.LayerManifest(
            layer_idx=kv.layer_idx,
            head_lengths=kv.head_lengths,
            num_window_queries=window,
            states=[state_tensor(tuple(state.shape), state.dtype) for state in kv.states],
        )
        yield self._message(Field.LAYER, manifest.SerializeToString())
        payload = [_bytes_of(state) for state in kv.states]
        fields = segments(self._header.kv_dtype, shape, kv.layer_idx, kv.num_entries, window)
        for segment in fields:
            tensor = getattr(kv, segment.name)
            assert (tensor.shape, tensor.dtype) == (segment.shape, segment.dtype), segment
            payload.append(_bytes_of(tensor))
        for offset, pieces in _cut(payload, self._frame_bytes):
            frame, num_bytes, crc32 = join_data_frame(kv.layer_idx, offset, pieces)
            self._digest.add_data(kv.layer_idx, offset, num_bytes, crc32)
            yield frame

    def trailer(
        self, final_hidden: Tensor, report: PrefillReport, state: SequenceState | None = None
    ) -> bytes:
        """The last frame. final_hidden: [hidden_size].  state: of a running sequence."""
        trailer = pb.TransferTrailer(
            final_hidden=bytes(_bytes_of(final_hidden.to(self._header.shape.dtype))),
            report=report_to_proto(report),
            sequence=None if state is None else state_to_proto(state),
        )
        trailer.digest = self._digest.finish(trailer)
        return join_frame(Field.TRAILER, trailer.SerializeToString())

    def _message(self, field: Field, body: bytes) -> bytes:
        self._digest.add_message(field, body)
        return join_frame(field, body)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; no copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _cut(payload: Sequence[memoryview], frame_bytes: int) -> Iterator[tuple[int, list[memoryview]]]:
    """Split the concatenated `payload` into pieces of `frame_bytes`: (offset, parts) of each."""
    offset, room, parts = 0, frame_bytes, list[memoryview]()
    for segment in payload:
        at = 0
        while at < len(segment):
            part = segment[at : at + room]
            parts.append(part)
            at, room = at + len(part), room - len(part)
            if room == 0:
                yield offset, parts
                offset, room, parts = offset + frame_bytes, frame_bytes, []
    if parts:
        yield offset, parts
