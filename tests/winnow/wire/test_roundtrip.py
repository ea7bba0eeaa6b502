from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow.wire.transfers import REPORT, SHAPE, encode, expected, make_layer, make_layers
from winnow.kv import LayerKV, ModelShape
from winnow.v1 import decode_pb2 as pb
from winnow.wire import Header, ReceiveBuffer, Trailer, TransferDecoder, read_header

HIDDEN = torch.linspace(-1, 1, SHAPE.hidden_size)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


def copy_of(layer: LayerKV) -> LayerKV:
    return LayerKV(
        layer.layer_idx,
        layer.keys.clone(),
        layer.values.clone(),
        layer.positions.clone(),
        layer.head_lengths,
        layer.window_queries.clone(),
    )


def receive(frames: list[bytes], decoder: TransferDecoder) -> list[Header | LayerKV | Trailer]:
    events = [decoder.feed(frame) for frame in frames[:1]]
    for frame in frames[1:]:
        event = decoder.feed(frame)
        events.append(copy_of(event) if isinstance(event, LayerKV) else event)
    return [event for event in events if event is not None]


def assert_same_layer(got: LayerKV, sent: LayerKV) -> None:
    assert got.head_lengths == sent.head_lengths
    assert got.layer_idx == sent.layer_idx
    for name in ("keys", "values", "positions", "window_queries"):
        ours, theirs = getattr(got, name), getattr(sent, name)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dtype=dtype)
    layers = make_layers(shape)
    decoder = TransferDecoder(expected(shape))
    header, *received, trailer = receive(encode(layers, HIDDEN, shape), decoder)
    assert isinstance(header, Header) and isinstance(trailer, Trailer)
    for got, sent in zip(received, layers, strict=True):
        assert isinstance(got, LayerKV)
        assert_same_layer(got, sent)
    assert torch.equal(bits(trailer.final_hidden), bits(HIDDEN.to(dtype)))
    assert trailer.report == REPORT
    assert decoder.complete


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4),
    window=st.integers(0, 8),
    frame_bytes=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
)
def test_ragged_heads_come_back_bit_for_bit(
    lengths: list[list[int]], window: int, frame_bytes: int, dtype: torch.dtype
) -> None:
    shape = ModelShape(len(lengths), 6, 3, 4, 16, dtype)
    layers = [make_layer(shape, idx, heads, window) for idx, heads in enumerate(lengths)]
    frames = encode(layers, torch.ones(16), shape, frame_bytes=frame_bytes)
    decoder = TransferDecoder(expected(shape), ReceiveBuffer())
    _, *received, _ = receive(frames, decoder)
    for got, sent in zip(received, layers, strict=True):
        assert isinstance(got, LayerKV)
        assert_same_layer(got, sent)


def test_protobuf_parses_what_the_encoder_writes() -> None:
    layers = make_layers()
    frames = [pb.PushFrame.FromString(frame) for frame in encode(layers, HIDDEN)]
    assert frames[0].header.request_id == "request-1"
    assert frames[0].header.codec == pb.CODEC_RAW
    assert list(frames[1].layer.head_lengths) == [5, 7]
    payload = b"".join(f.data.payload for f in frames if f.data.layer_idx == 0)
    tensors = (layers[0].positions, layers[0].keys, layers[0].values, layers[0].window_queries)
    assert payload == b"".join(t.numpy().tobytes() for t in tensors)
    assert frames[-1].trailer.report.selection_layer == 1


def test_decoder_reads_what_protobuf_writes() -> None:
    layers = make_layers()
    rewritten = [
        pb.PushFrame.FromString(frame).SerializeToString() for frame in encode(layers, HIDDEN)
    ]
    _, *received, _ = receive(rewritten, TransferDecoder(expected()))
    for got, sent in zip(received, layers, strict=True):
        assert isinstance(got, LayerKV)
        assert_same_layer(got, sent)


def test_tensors_that_are_not_contiguous_are_sent_row_by_row() -> None:
    layers = make_layers()
    turned = layers[0].window_queries.transpose(0, 1).contiguous().transpose(0, 1)
    layers[0] = replace(layers[0], window_queries=turned)
    _, got, *_ = receive(encode(layers, HIDDEN), TransferDecoder(expected()))
    assert isinstance(got, LayerKV)
    assert torch.equal(got.window_queries, turned)


def test_next_layer_arrives_in_the_same_memory() -> None:
    layers, decoder = make_layers(), TransferDecoder(expected())
    layers[1] = replace(layers[0], layer_idx=1)
    events = [decoder.feed(frame) for frame in encode(layers, HIDDEN)]
    first, second = (event for event in events if isinstance(event, LayerKV))
    assert first.keys.data_ptr() == second.keys.data_ptr()


def test_report_without_selection_comes_back_whole() -> None:
    report = replace(REPORT, selection_layer=None, no_selection_reason="short_prompt")
    frames = encode(make_layers(), HIDDEN, report=report)
    *_, end = receive(frames, TransferDecoder(expected()))
    assert isinstance(end, Trailer)
    assert end.report == report


def test_read_header_tells_whose_transfer_it_is() -> None:
    header = read_header(encode(make_layers(), HIDDEN)[0])
    assert (header.request_id, header.attempt, header.shape) == ("request-1", 1, SHAPE)
