from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow.wire.transfers import REPORT, SHAPE, encode, expected, make_layer, make_layers
from winnow.errors import TransferMalformed
from winnow.kv import KV_DTYPES, KvDtype, KVSize, LayerKV, ModelShape
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
        None if layer.scales is None else layer.scales.clone(),
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
    names = ["keys", "values", "positions", "window_queries"]
    for name in names + ([] if sent.scales is None else ["scales"]):
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


def test_a_layer_for_a_gpu_arrives_in_pinned_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer before may still be on its way to the device."""
    allocate, pinned = torch.empty, list[bool]()

    def empty(*size: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        pinned.append(pin_memory)
        return allocate(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    buffer = ReceiveBuffer(torch.device("cuda"))
    first, second = buffer.take(8), buffer.take(8)
    assert first.data_ptr() != second.data_ptr()
    assert pinned[-2:] == [True, True]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4),
    window=st.integers(0, 8),
    frame_bytes=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    head_dim=st.integers(1, 5),
    kv_dtype=st.sampled_from(KV_DTYPES),
)
def test_ragged_heads_come_back_bit_for_bit(
    lengths: list[list[int]],
    window: int,
    frame_bytes: int,
    dtype: torch.dtype,
    head_dim: int,
    kv_dtype: KvDtype,
) -> None:
    shape = ModelShape(len(lengths), 6, 3, head_dim, 16, dtype)
    layers = [make_layer(shape, idx, heads, window) for idx, heads in enumerate(lengths)]
    if kv_dtype == "int8":
        layers = [layer.quantized() for layer in layers]
    frames = encode(layers, torch.ones(16), shape, frame_bytes=frame_bytes, kv_dtype=kv_dtype)
    decoder = TransferDecoder(expected(shape), ReceiveBuffer())
    _, *received, _ = receive(frames, decoder)
    for got, sent in zip(received, layers, strict=True):
        assert isinstance(got, LayerKV)
        assert_same_layer(got, sent)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_layers_of_several_sizes_come_without_padding(kv_dtype: KvDtype) -> None:
    shape = ModelShape(
        2, 8, 4, 16, 32, torch.float32, own_sizes=(KVSize(4, 8, 6), KVSize(2, 16, 16))
    )
    layers = [make_layer(shape, 0, (3, 0, 5, 1)), make_layer(shape, 1, (7, 2))]
    if kv_dtype == "int8":
        layers = [layer.quantized() for layer in layers]
    decoder = TransferDecoder(expected(shape))
    frames = encode(layers, HIDDEN, shape, kv_dtype=kv_dtype)
    _, *received, _ = receive(frames, decoder)
    for got, sent in zip(received, layers, strict=True):
        assert isinstance(got, LayerKV)
        assert_same_layer(got, sent)
    queries = sum(layer.window_queries.nbytes for layer in layers)
    scales = 0 if kv_dtype == "auto" else 18 * 4
    numbers = 9 * (8 + 6) + 9 * (16 + 16)
    number_bytes = 4 if kv_dtype == "auto" else 1
    assert decoder.payload_bytes == numbers * number_bytes + scales + queries + 18 * 4


def test_more_heads_than_a_layer_has_are_refused() -> None:
    shape = ModelShape(
        2, 8, 4, 16, 32, torch.float32, own_sizes=(KVSize(4, 16, 16), KVSize(2, 16, 16))
    )
    layers = [make_layer(shape, 0, (1, 1, 1, 1)), make_layer(shape, 1, (1, 1, 1, 1))]
    with pytest.raises(TransferMalformed, match=r"layer 1 announces 4 KV heads; the layer has 2"):
        receive(encode(layers, HIDDEN, shape), TransferDecoder(expected(shape)))


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


def test_protobuf_parses_int8_keys_and_values_with_their_scales() -> None:
    layers = make_layers()
    frames = [pb.PushFrame.FromString(frame) for frame in encode(layers, HIDDEN, kv_dtype="int8")]
    assert (frames[0].header.wire_version, frames[0].header.codec) == (6, pb.CODEC_INT8)
    payload = b"".join(f.data.payload for f in frames if f.data.layer_idx == 0)
    layer = layers[0].quantized()
    assert layer.scales is not None
    tensors = (layer.positions, layer.scales, layer.window_queries, layer.keys, layer.values)
    assert payload == b"".join(t.numpy().tobytes() for t in tensors)


@pytest.mark.parametrize(("head_dim", "share"), [(64, 66 / 128), (128, 130 / 256)])
def test_int8_sends_half_of_the_bytes(head_dim: int, share: float) -> None:
    shape = replace(SHAPE, head_dim=head_dim, dtype=torch.bfloat16)
    layers = [make_layer(shape, idx, (20, 30), window=0) for idx in range(2)]
    sent = [
        sum(map(len, encode(layers, HIDDEN, shape, frame_bytes=1 << 20, kv_dtype=kv_dtype)))
        for kv_dtype in KV_DTYPES
    ]
    saved = 2 * shape.kv_bytes(50) * (1 - share)
    assert sent[0] - sent[1] == pytest.approx(saved, rel=0.001)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_layer_of_the_other_kind_is_converted_before_it_is_sent(kv_dtype: KvDtype) -> None:
    layers = make_layers()
    exact = [layer.quantized().dequantized(SHAPE.dtype) for layer in layers]
    other = exact if kv_dtype == "int8" else [layer.quantized() for layer in layers]
    expected_layers = [layer.quantized() for layer in layers] if kv_dtype == "int8" else exact
    frames = encode(other, HIDDEN, kv_dtype=kv_dtype)
    _, *received, _ = receive(frames, TransferDecoder(expected()))
    for got, sent in zip(received, expected_layers, strict=True):
        assert isinstance(got, LayerKV)
        assert_same_layer(got, sent)


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
