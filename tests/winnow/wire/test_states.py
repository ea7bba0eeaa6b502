"""Transfers of models with recurrent layers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.winnow.wire.transfers import NUM_PROMPT_TOKENS, SHAPE, encode, expected, make_layer
from winnow.errors import TransferMalformed, TransferMismatch
from winnow.kv import KV_DTYPES, KvDtype, LayerKV, without_entries
from winnow.layer_state import StatePart
from winnow.layers import FULL, Layer
from winnow.v1 import decode_pb2 as pb
from winnow.wire import Expected, Grant, TransferDecoder

CONV = StatePart("conv", 0, (5, 3), torch.bfloat16)
MATRIX = StatePart("recurrent", 0, (2, 4, 4), torch.float32)
# A recurrent layer, an attention layer, one with both, one with neither.
HYBRID = replace(
    SHAPE,
    num_layers=4,
    layers=(Layer(None, is_recurrent=True), FULL, Layer(is_recurrent=True), Layer(None)),
    states=((CONV, MATRIX), (), (CONV,), ()),
)
CPU = torch.device("cpu")


def state(part: StatePart) -> Tensor:
    return torch.randn(part.shape).to(part.dtype)


def layers() -> list[LayerKV]:
    torch.manual_seed(0)
    return [
        replace(without_entries(HYBRID, 0, CPU), states=(state(CONV), state(MATRIX))),
        make_layer(HYBRID, 1, (5, 7)),
        replace(make_layer(HYBRID, 2, (1, 4)), states=(state(CONV),)),
        without_entries(HYBRID, 3, CPU),
    ]


def receive(frames: list[bytes], to: Expected) -> list[LayerKV]:
    decoder, found = TransferDecoder(to), []
    for frame in frames:
        event = decoder.feed(frame)
        if isinstance(event, LayerKV):
            found.append(
                replace(event.to("cpu"), states=tuple(one.clone() for one in event.states))
            )
    decoder.require_complete()
    return found


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_states_arrive_bit_for_bit_whatever_keys_are_sent_as(kv_dtype: KvDtype) -> None:
    sent = layers()
    frames = encode(sent, torch.ones(32), HYBRID, kv_dtype=kv_dtype)
    received = receive(frames, expected(HYBRID))
    for got, own in zip(received, sent, strict=True):
        assert got.head_lengths == own.head_lengths
        assert [one.dtype for one in got.states] == [one.dtype for one in own.states]
        assert all(map(torch.equal, got.states, own.states))


def refused(own: list[LayerKV], message: str) -> None:
    with pytest.raises(TransferMalformed, match=message):
        receive(encode(own, torch.ones(32), HYBRID), expected(HYBRID))


@pytest.mark.parametrize(
    ("layer_idx", "change", "message"),
    [
        (0, lambda own: (), "layer 0 announces another state .* 0 tensors; 2 are due"),
        (0, lambda own: own[:1], r"1 tensors; 2 are due \(5 x 3 bfloat16, 2 x 4 x 4 float32\)"),
        (0, lambda own: (own[0], own[1].half()), "layer 0 announces another state"),
        (2, lambda own: (own[0].T,), "layer 2 announces another state"),
        (1, lambda own: (state(CONV),), r"layer 1 announces .* 1 tensors; 0 are due \(none\)"),
    ],
)
def test_a_state_that_is_not_the_layers_is_refused(
    layer_idx: int, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], message: str
) -> None:
    own = layers()
    own[layer_idx] = replace(own[layer_idx], states=change(own[layer_idx].states))
    refused(own, message)


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_a_state_that_is_not_finite_is_refused(broken: float) -> None:
    own = layers()
    own[0].states[1].view(-1)[-1] = broken
    refused(own, "states of layer 0 are not finite")


def test_entries_of_a_layer_without_keys_are_refused() -> None:
    own = layers()
    own[3] = make_layer(HYBRID, 3, (0, 2))
    refused(own, "layer 3 announces 2 entries of one KV head; it has no keys and values")


def test_the_older_wire_version_has_no_states() -> None:
    to = replace(expected(HYBRID), grant=(grant := Grant.issue((5,))))
    frame = pb.PushFrame.FromString(encode(layers(), torch.ones(32), HYBRID)[0])
    frame.header.wire_version = 5
    frame.header.transfer_token = grant.ticket(1).token
    with pytest.raises(TransferMismatch, match="need wire version 6; that of the transfer is 5"):
        receive([frame.SerializeToString()], to)
    assert frame.header.num_prompt_tokens == NUM_PROMPT_TOKENS
