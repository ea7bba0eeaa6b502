"""Decoder of KV transfers; validates every frame before it is used."""

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import TransferDamaged, TransferMalformed, TransferMismatch
from winnow.kv import LayerKV, ModelShape, SequenceState, named_heads
from winnow.report import PrefillReport
from winnow.v1 import decode_pb2 as pb
from winnow.wire.framing import DataFrame, Field, read_data_frame, split_frame
from winnow.wire.grant import FIRST_WITH_STATES, Grant
from winnow.wire.incoming import IncomingLayer, ReceiveBuffer
from winnow.wire.messages import (
    Digest,
    Header,
    header_from_bytes,
    parse,
    report_from_proto,
    state_from_proto,
    state_tensor,
)
from winnow.wire.payload import segments, state_segments


@dataclass(frozen=True, slots=True)
class Expected:
    """What a receiver accepts; anything else is refused before memory is allocated for it.

    grant: issued with the reservation.
    max_entries: KV entries per (layer, KV head).  max_in_windows: the same of layers with a window,
    whose heads have no more than that; None: as many.  max_window: window queries per layer.
    max_generated: limit of the generated tokens of a running sequence; None: it is prefill's KV.
    heads: the transfer is a part with some of these KV heads; None: it has all of the model's.
    """

    grant: Grant
    fingerprint: str
    shape: ModelShape
    num_prompt_tokens: int
    max_entries: int
    max_window: int
    max_generated: int | None = None
    heads: range | None = None
    max_in_windows: int | None = None

    def most_entries(self, layer_idx: int) -> int:
        """KV entries of one KV head of the layer."""
        window = self.shape.layers[layer_idx].window
        if window is None:
            return self.max_entries
        return min(window, self.max_in_windows or self.max_entries)

    @property
    def num_positions(self) -> int:
        """Exclusive upper bound of entry positions."""
        return self.num_prompt_tokens + (self.max_generated or 0)


@dataclass(frozen=True, slots=True, eq=False)
class Trailer:
    """The end of a complete transfer. final_hidden: [hidden_size], owned.

    state: of a running sequence; None for prefill's KV.
    """

    final_hidden: Tensor
    report: PrefillReport
    state: SequenceState | None = None


class TransferDecoder:
    """Decodes one transfer frame by frame; unusable after an error."""

    def __init__(self, expected: Expected, buffer: ReceiveBuffer | None = None) -> None:
        self._expected = expected
        self._buffer = buffer or ReceiveBuffer()
        self._digest = Digest()
        self._header: Header | None = None
        self._layer: IncomingLayer | None = None
        self.complete = False  # whether the trailer was read and everything is valid
        self.num_layers = 0  # layers received completely
        self.payload_bytes = 0

    def feed(self, frame: bytes) -> Header | LayerKV | Trailer | None:
        """Decode a frame; returns the header, layer or trailer that it completes, if any.

        A LayerKV's tensors are views of the receive buffer, valid until the next call.
        Raises a subclass of TransferRefused for every defect.
        """
        field, body = split_frame(frame)
        if field is not self._next_field():
            raise TransferDamaged(
                f"a {field.name} frame arrived out of turn, after {self.num_layers} layers"
            )
        match field:
            case Field.HEADER:
                return self._read_header(bytes(body))
            case Field.LAYER:
                return self._read_manifest(bytes(body))
            case Field.DATA:
                return self._read_data(read_data_frame(body))
            case Field.TRAILER:
                return self._read_trailer(bytes(body))

    def require_complete(self) -> None:
        """Raise TransferDamaged unless the trailer was read."""
        if not self.complete:
            raise TransferDamaged(
                f"transfer ended after {self.num_layers} of {self._expected.shape.num_layers} "
                "layers, without its trailer"
            )

    def _next_field(self) -> Field | None:
        if self._header is None:
            return Field.HEADER
        if self._layer is not None:
            return Field.DATA
        if self.num_layers < self._expected.shape.num_layers:
            return Field.LAYER
        return None if self.complete else Field.TRAILER

    def _read_header(self, body: bytes) -> Header:
        header, expected = header_from_bytes(body), self._expected
        expected.grant.require(header.ticket, header.attempt)
        _require_same("model fingerprint", header.fingerprint, expected.fingerprint)
        _require_same("model shape", header.shape, expected.shape)
        _require_heads(header.heads, expected.heads)
        if expected.shape.has_states and header.ticket.wire_version < FIRST_WITH_STATES:
            raise TransferMismatch(
                f"recurrent layers need wire version {FIRST_WITH_STATES}; that of the transfer is "
                f"{header.ticket.wire_version}"
            )
        if header.num_prompt_tokens != expected.num_prompt_tokens:
            raise TransferMalformed(
                f"transfer is for {header.num_prompt_tokens} prompt tokens; "
                f"the reservation is for {expected.num_prompt_tokens}"
            )
        self._digest.add_message(Field.HEADER, body)
        self._header = header
        return header

    def _read_manifest(self, body: bytes) -> LayerKV | None:
        manifest = parse(pb.LayerManifest(), body)
        self._require_bounds(manifest)
        assert self._header is not None
        layer_idx, lengths = manifest.layer_idx, tuple(manifest.head_lengths)
        states = state_segments(self._expected.shape.states[layer_idx])
        shape, window = self._sent_shape, manifest.num_window_queries
        parts = segments(self._header.kv_dtype, shape, layer_idx, sum(lengths), window)
        parts = states + parts
        payload = self._buffer.take(sum(part.num_bytes for part in parts))
        self._digest.add_message(Field.LAYER, body)
        self._layer = IncomingLayer(layer_idx, lengths, parts, len(states), payload)
        return self._finish_layer() if self._layer.whole else None

    @property
    def _sent_shape(self) -> ModelShape:
        """This worker's, which knows each layer's own size, with the heads that are sent."""
        assert self._header is not None
        shape, heads = self._expected.shape, self._header.heads
        return shape if heads is None else shape.part(len(heads))

    def _require_bounds(self, manifest: pb.LayerManifest) -> None:
        expected = self._expected
        assert self._header is not None
        if manifest.layer_idx != self.num_layers:
            raise TransferDamaged(
                f"layer {manifest.layer_idx} was announced; layer {self.num_layers} is next"
            )
        num_kv_heads = self._sent_shape.sizes[manifest.layer_idx].num_kv_heads
        if len(manifest.head_lengths) != num_kv_heads:
            whose = "the layer" if self._header.heads is None else "the part"
            raise TransferMalformed(
                f"layer {manifest.layer_idx} announces {len(manifest.head_lengths)} KV heads; "
                f"{whose} has {num_kv_heads}"
            )
        longest, most = max(manifest.head_lengths), expected.most_entries(manifest.layer_idx)
        if longest > most:
            raise TransferMalformed(
                f"layer {manifest.layer_idx} announces {longest} entries of one KV head; "
                f"the reservation is for {most}"
            )
        if manifest.num_window_queries > expected.max_window:
            raise TransferMalformed(
                f"layer {manifest.layer_idx} announces {manifest.num_window_queries} window "
                f"queries; the limit is {expected.max_window}"
            )
        if longest and not expected.shape.layers[manifest.layer_idx].has_kv:
            raise TransferMalformed(
                f"layer {manifest.layer_idx} announces {longest} entries of one KV head; it has no "
                "keys and values"
            )
        self._require_states(manifest)

    def _require_states(self, manifest: pb.LayerManifest) -> None:
        parts = self._expected.shape.states[manifest.layer_idx]
        due = [state_tensor(part.shape, part.dtype) for part in parts]
        if list(manifest.states) != due:
            named = ", ".join(map(str, parts)) or "none"
            raise TransferMalformed(
                f"layer {manifest.layer_idx} announces another state than this worker's layer has: "
                f"{len(manifest.states)} tensors; {len(parts)} are due ({named})"
            )

    def _read_data(self, data: DataFrame) -> LayerKV | None:
        assert self._layer is not None
        self._layer.write(data)
        self._digest.add_data(data.layer_idx, data.offset, len(data.payload), data.crc32)
        self.payload_bytes += len(data.payload)
        return self._finish_layer() if self._layer.whole else None

    def _finish_layer(self) -> LayerKV:
        assert self._layer is not None
        kv = self._layer.views()
        _require_ascending(kv, self._expected.num_positions)
        for state in kv.states:
            _require_finite(f"states of layer {kv.layer_idx}", state)
        _require_finite(f"window_queries of layer {kv.layer_idx}", kv.window_queries)
        if kv.scales is None:
            for name in ("keys", "values"):
                _require_finite(f"{name} of layer {kv.layer_idx}", getattr(kv, name))
        else:
            _require_scales(kv.layer_idx, kv.scales, self._expected.shape.dtype)
        self._layer = None
        self.num_layers += 1
        return kv

    def _read_trailer(self, body: bytes) -> Trailer:
        trailer, shape = parse(pb.TransferTrailer(), body), self._expected.shape
        if len(trailer.final_hidden) != shape.hidden_size * shape.dtype.itemsize:
            raise TransferMalformed(f"final hidden state has {len(trailer.final_hidden)} bytes")
        if self._digest.finish(trailer) != trailer.digest:
            raise TransferDamaged("digest of the transfer does not match")
        self._require_position(trailer.report.next_position, 0)
        state = self._read_state(trailer)
        hidden = torch.frombuffer(bytearray(trailer.final_hidden), dtype=shape.dtype)
        _require_finite("numbers of the final hidden state", hidden)
        self.complete = True
        return Trailer(hidden, report_from_proto(trailer.report), state)

    def _read_state(self, trailer: pb.TransferTrailer) -> SequenceState | None:
        limit = self._expected.max_generated
        if trailer.HasField("sequence") != (limit is not None):
            raise TransferMalformed("a running sequence where prefill's KV is due, or the reverse")
        if limit is None:
            return None
        num_generated = len(trailer.sequence.token_ids)
        if num_generated >= limit:
            raise TransferMalformed(
                f"the sequence runs with {num_generated} tokens; its max_tokens is {limit}"
            )
        self._require_position(trailer.sequence.next_position, num_generated)
        return state_from_proto(trailer.sequence)

    def _require_position(self, next_position: int, num_generated: int) -> None:
        num_prompt_tokens = self._expected.num_prompt_tokens
        if not 1 <= next_position - num_generated <= num_prompt_tokens:
            raise TransferMalformed(
                f"decoding is to go on at position {next_position} after "
                f"{num_prompt_tokens} prompt tokens and {num_generated} more"
            )


def _require_same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise TransferMismatch(f"{what} of the transfer is {got}; this worker has {expected}")


def _require_heads(got: range | None, expected: range | None) -> None:
    """Raise TransferMismatch for a part where none is due, or the reverse, or of other heads."""
    if expected is None:
        if got is not None:
            raise TransferMismatch(
                f"transfer is a part, of KV {named_heads(got)}; all heads are due"
            )
    elif got is None or got.start < expected.start or got.stop > expected.stop:
        what = "all KV heads" if got is None else f"KV {named_heads(got)}"
        raise TransferMismatch(f"transfer is of {what}; this rank has KV {named_heads(expected)}")


def _require_finite(what: str, tensor: Tensor) -> None:
    """Raise TransferMalformed for inf or NaN; min and max reveal both in one pass."""
    if tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise TransferMalformed(f"{what} are not finite")


def _require_scales(layer_idx: int, scales: Tensor, dtype: torch.dtype) -> None:
    """Raise TransferMalformed unless any int8, times these scales, is finite in the dtype."""
    _require_finite(f"scales of layer {layer_idx}", scales)
    if not scales.numel():
        return
    least, most = scales.aminmax()
    limit = torch.finfo(dtype).max / -torch.iinfo(torch.int8).min
    if least < 0 or most > limit:
        raise TransferMalformed(
            f"scales of layer {layer_idx} reach from {float(least):g} to {float(most):g}; the "
            f"limits are 0 and {limit:g}"
        )


def _require_ascending(kv: LayerKV, num_positions: int) -> None:
    """Raise TransferMalformed unless each head's positions ascend within [0, num_positions)."""
    for rows in kv.head_slices():
        head = kv.positions[rows]
        if head.numel() and not (
            head[0] >= 0 and head[-1] < num_positions and bool((head[1:] > head[:-1]).all())
        ):
            raise TransferMalformed(
                f"positions of layer {kv.layer_idx} do not ascend within {num_positions} tokens"
            )
