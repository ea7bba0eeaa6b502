from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.winnow.wire.transfers import (
    NUM_PROMPT_TOKENS,
    REPORT,
    SHAPE,
    encode,
    expected,
    make_layers,
)
from winnow.errors import (
    TransferDamaged,
    TransferMalformed,
    TransferMismatch,
    TransferRefused,
)
from winnow.kv_quantization import dequantize
from winnow.layers import FULL, Layer
from winnow.v1 import decode_pb2 as pb
from winnow.wire import MAX_PAYLOAD_BYTES, Expected, TransferDecoder, read_header
from winnow.wire.framing import MAX_FRAME_BYTES, Field, join_data_frame, join_frame

# 0: header; 1: manifest of layer 0; 2 to 9: its data; then the same for layer 1; trailer.
FRAMES = encode(make_layers(), torch.ones(32))
INT8_FRAMES = encode(make_layers(), torch.ones(32), kv_dtype="int8")
MANIFEST, FIRST_DATA, SECOND_DATA, TRAILER = 1, 2, 3, len(FRAMES) - 1


def feed_all(frames: list[bytes], to: Expected | None = None) -> TransferDecoder:
    decoder = TransferDecoder(to or expected())
    for frame in frames:
        decoder.feed(frame)
    return decoder


def with_change(frame_idx: int, change: Callable[[pb.PushFrame], object]) -> list[bytes]:
    """The frames of a sound transfer but for one, which `change` altered."""
    message = pb.PushFrame.FromString(FRAMES[frame_idx])
    change(message)
    return [*FRAMES[:frame_idx], message.SerializeToString(), *FRAMES[frame_idx + 1 :]]


def set_header(**fields: Any) -> list[bytes]:
    return with_change(0, lambda f: f.header.MergeFrom(pb.TransferHeader(**fields)))


def test_the_untouched_transfer_is_taken() -> None:
    assert feed_all(FRAMES).complete


@settings(max_examples=300)
@given(data=st.data(), frames=st.sampled_from([FRAMES, INT8_FRAMES]))
def test_no_flipped_bit_yields_another_transfer(data: st.DataObject, frames: list[bytes]) -> None:
    frame_idx = data.draw(st.integers(0, len(frames) - 1))
    damaged = bytearray(frames[frame_idx])
    byte_idx = data.draw(st.integers(0, len(damaged) - 1))
    damaged[byte_idx] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TransferRefused):
        feed_all([*frames[:frame_idx], bytes(damaged), *frames[frame_idx + 1 :]])


@settings(max_examples=200)
@given(frame_idx=st.integers(0, len(FRAMES) - 1), junk=st.binary(max_size=200))
def test_junk_in_place_of_a_frame_is_refused(frame_idx: int, junk: bytes) -> None:
    if junk != FRAMES[frame_idx]:
        with pytest.raises(TransferRefused):
            feed_all([*FRAMES[:frame_idx], junk, *FRAMES[frame_idx + 1 :]])


@settings(max_examples=100)
@given(data=st.data())
def test_any_cut_frame_is_refused(data: st.DataObject) -> None:
    frame_idx = data.draw(st.integers(0, len(FRAMES) - 1))
    cut = data.draw(st.integers(0, len(FRAMES[frame_idx]) - 1))
    with pytest.raises(TransferRefused):
        feed_all([*FRAMES[:frame_idx], FRAMES[frame_idx][:cut]])


@pytest.mark.parametrize("missing", range(len(FRAMES)))
def test_a_missing_frame_is_refused(missing: int) -> None:
    with pytest.raises(TransferRefused):
        feed_all([*FRAMES[:missing], *FRAMES[missing + 1 :]]).require_complete()


@pytest.mark.parametrize("twice", range(len(FRAMES)))
def test_a_duplicate_frame_is_refused(twice: int) -> None:
    with pytest.raises(TransferDamaged):
        feed_all([*FRAMES[: twice + 1], *FRAMES[twice:]])


def test_swapped_frames_are_refused() -> None:
    swapped = list(FRAMES)
    swapped[FIRST_DATA], swapped[SECOND_DATA] = swapped[SECOND_DATA], swapped[FIRST_DATA]
    with pytest.raises(TransferDamaged, match="layer 0 at byte 0 is next"):
        feed_all(swapped)


def test_overlapping_data_is_refused() -> None:
    frame, *_ = join_data_frame(0, 128, [memoryview(bytes(256))])
    with pytest.raises(TransferDamaged, match="layer 0 at byte 256 is next"):
        feed_all([*FRAMES[:SECOND_DATA], frame])


def test_data_beyond_the_announced_layer_is_refused() -> None:
    frame, *_ = join_data_frame(0, 0, [memoryview(bytes(100_000))])
    with pytest.raises(TransferMalformed, match="data goes on to 100000"):
        feed_all([*FRAMES[:FIRST_DATA], frame])


def test_data_sent_by_another_transfer_fails_the_digest() -> None:
    payload = pb.PushFrame.FromString(FRAMES[SECOND_DATA]).data.payload
    frame, *_ = join_data_frame(0, 256, [memoryview(bytes(len(payload)))])
    with pytest.raises(TransferDamaged, match="digest"):
        feed_all([*FRAMES[:SECOND_DATA], frame, *FRAMES[SECOND_DATA + 1 :]])


def test_a_changed_final_hidden_state_fails_the_digest() -> None:
    frames = with_change(TRAILER, lambda f: setattr(f.trailer, "final_hidden", bytes(32 * 4)))
    with pytest.raises(TransferDamaged, match="digest"):
        feed_all(frames)


def test_a_final_hidden_state_of_another_size_is_refused() -> None:
    frames = with_change(TRAILER, lambda f: setattr(f.trailer, "final_hidden", bytes(3)))
    with pytest.raises(TransferMalformed, match="3 bytes"):
        feed_all(frames)


@pytest.mark.parametrize("position", [0, 41])
def test_a_next_position_outside_the_prompt_is_refused(position: int) -> None:
    report = replace(REPORT, next_position=position)
    frames = encode(make_layers(), torch.ones(32), report=report)
    with pytest.raises(TransferMalformed, match=f"position {position} after 40 prompt tokens"):
        feed_all(frames)


def test_a_changed_report_fails_the_digest() -> None:
    frames = with_change(TRAILER, lambda f: setattr(f.trailer.report, "next_position", 39))
    with pytest.raises(TransferDamaged, match="digest"):
        feed_all(frames)


@pytest.mark.parametrize("name", ["keys", "values", "window_queries"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(name: str, broken: float) -> None:
    layers = make_layers()
    getattr(layers[1], name).view(-1)[-1] = broken
    with pytest.raises(TransferMalformed, match=f"{name} of layer 1 are not finite"):
        feed_all(encode(layers, torch.ones(32)))
    hidden = torch.ones(32)
    hidden[3] = broken
    with pytest.raises(TransferMalformed, match="final hidden state are not finite"):
        feed_all(encode(make_layers(), hidden))


def test_a_transfer_without_trailer_is_refused() -> None:
    decoder = feed_all(FRAMES[:-1])
    with pytest.raises(TransferDamaged, match="2 of 2 layers, without its trailer"):
        decoder.require_complete()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"wire_version": 1}, "wire version of the transfer is 1; 6 was agreed on"),
        ({"wire_version": 5}, "wire version of the transfer is 5; 6 was agreed on"),
        ({"model_fingerprint": "xyz"}, "fingerprint of the transfer is xyz; this worker has abc"),
        ({"num_layers": 3}, "shape"),
        ({"num_layers": 2**31}, "shape of the transfer has 2147483648 layers; the limit is 16384"),
        ({"dtype": pb.DTYPE_BFLOAT16}, "shape"),
        ({"dtype": 9}, "dtype 9"),
        ({"codec": 7}, "codec 7"),
    ],
)
def test_another_models_transfer_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(TransferMismatch, match=named):
        feed_all(set_header(**fields))


@pytest.mark.parametrize(
    ("frames", "codec", "error"),
    [
        (FRAMES, pb.CODEC_INT8, TransferMalformed),  # more data than that codec has
        (INT8_FRAMES, pb.CODEC_RAW, TransferDamaged),  # less: the next layer comes too early
    ],
)
def test_a_header_that_lies_about_its_codec_is_refused(
    frames: list[bytes], codec: pb.Codec, error: type[TransferRefused]
) -> None:
    header = pb.PushFrame.FromString(frames[0])
    header.header.codec = codec
    with pytest.raises(error, match=r"data goes on to|LAYER frame arrived out of turn"):
        feed_all([header.SerializeToString(), *frames[1:]])


@pytest.mark.parametrize(
    ("scale", "named"),
    [
        (float("nan"), "scales of layer 1 are not finite"),
        (float("inf"), "scales of layer 1 are not finite"),
        (-0.5, "scales of layer 1 reach from -0.5 to"),
        (512.0, "to 512; the limits are 0 and 511.75"),  # -128 * 512 is no float16
    ],
)
def test_scales_of_numbers_that_cannot_be_are_refused(scale: float, named: str) -> None:
    with pytest.raises(TransferMalformed, match=named):
        feed_all(*with_scale(scale, torch.float16))


@pytest.mark.parametrize(("scale", "dtype"), [(511.75, torch.float16), (600, torch.bfloat16)])
def test_a_large_scale_is_taken_where_its_numbers_are_finite(
    scale: float, dtype: torch.dtype
) -> None:
    assert feed_all(*with_scale(scale, dtype)).complete
    lowest = torch.full((1, 1), -128, dtype=torch.int8)
    assert dequantize(lowest, torch.tensor([scale]).half(), dtype).isfinite().all()


def with_scale(scale: float, dtype: torch.dtype) -> tuple[list[bytes], Expected]:
    shape = replace(SHAPE, dtype=dtype)
    layers = [layer.quantized() for layer in make_layers(shape)]
    assert layers[1].scales is not None
    layers[1].scales[3, 1] = scale
    return encode(layers, torch.ones(32), shape, kv_dtype="int8"), expected(shape)


def test_another_prompt_length_is_refused() -> None:
    with pytest.raises(TransferMalformed, match="41 prompt tokens; the reservation is for 40"):
        feed_all(set_header(num_prompt_tokens=41))


def test_more_entries_than_reserved_are_refused_before_memory_is_taken() -> None:
    frames = with_change(MANIFEST, lambda f: f.layer.head_lengths.__setitem__(0, 2**32 - 1))
    with pytest.raises(TransferMalformed, match="4294967295 entries"):
        feed_all(frames)


def test_one_entry_over_the_reservation_is_refused() -> None:
    with pytest.raises(TransferMalformed, match="announces 7 entries"):
        feed_all(FRAMES, replace(expected(), max_entries=6))


def test_more_entries_than_a_layers_window_are_refused() -> None:
    shape = replace(SHAPE, layers=(Layer("sliding", 6), *SHAPE.layers[1:]))
    with pytest.raises(TransferMalformed, match=r"layer 0 announces 7 entries.* is for 6"):
        feed_all(FRAMES, expected(shape))


def test_entries_of_windows_are_not_bound_by_what_recompression_leaves_to_full_layers() -> None:
    shape = replace(SHAPE, layers=(FULL, *(Layer("sliding", 9) for _ in SHAPE.layers[1:])))
    to = replace(expected(shape), max_entries=7, max_in_windows=8)
    assert feed_all(FRAMES, to).complete
    with pytest.raises(TransferMalformed, match=r"layer 1 announces 7 entries.* is for 6"):
        feed_all(FRAMES, replace(to, max_in_windows=6))


def test_more_window_queries_than_allowed_are_refused() -> None:
    frames = with_change(MANIFEST, lambda f: setattr(f.layer, "num_window_queries", 2**31))
    with pytest.raises(TransferMalformed, match="window queries; the limit is 8"):
        feed_all(frames)


def test_another_number_of_heads_is_refused() -> None:
    frames = with_change(MANIFEST, lambda f: f.layer.head_lengths.append(1))
    with pytest.raises(TransferMalformed, match="3 KV heads; the layer has 2"):
        feed_all(frames)


@pytest.mark.parametrize("position", [-1, NUM_PROMPT_TOKENS])
def test_positions_outside_the_prompt_are_refused(position: int) -> None:
    layers = make_layers()
    layers[0].positions[0 if position < 0 else 4] = position
    with pytest.raises(TransferMalformed, match="do not ascend within 40"):
        feed_all(encode(layers, torch.ones(32)))


def test_positions_out_of_order_are_refused() -> None:
    layers = make_layers()
    layers[0].positions[:2] = layers[0].positions[:2].flip(0)
    with pytest.raises(TransferMalformed, match="do not ascend"):
        feed_all(encode(layers, torch.ones(32)))


def test_a_frame_over_the_limit_is_refused() -> None:
    with pytest.raises(TransferMalformed, match="the limit is"):
        feed_all([bytes(MAX_FRAME_BYTES + 1)])


def test_a_payload_over_the_limit_is_refused() -> None:
    frame, *_ = join_data_frame(0, 0, [memoryview(bytes(MAX_PAYLOAD_BYTES + 1))])
    with pytest.raises(TransferMalformed, match="allowed are 1 to"):
        feed_all([*FRAMES[:FIRST_DATA], frame])


def test_an_empty_payload_is_refused() -> None:
    frame, *_ = join_data_frame(0, 0, [])
    with pytest.raises(TransferMalformed, match="payload has 0 bytes"):
        feed_all([*FRAMES[:FIRST_DATA], frame])


def test_a_huge_header_is_refused() -> None:
    with pytest.raises(TransferMalformed, match="the limit is 4096"):
        read_header(join_frame(Field.HEADER, bytes(5000)))


def test_a_transfer_that_starts_elsewhere_is_refused() -> None:
    with pytest.raises(TransferMalformed, match="kind LAYER"):
        read_header(FRAMES[MANIFEST])


@pytest.mark.parametrize("fields", [{"request_id": "r" * 129}, {"attempt": 0}])
def test_a_header_without_name_or_attempt_is_refused(fields: dict[str, Any]) -> None:
    header = pb.PushFrame.FromString(FRAMES[0]).header
    for name, value in fields.items():
        setattr(header, name, value)
    with pytest.raises(TransferMalformed, match="names no request"):
        read_header(join_frame(Field.HEADER, header.SerializeToString()))
