"""Transfers of some KV heads."""

from dataclasses import replace

import pytest
import torch

from tests.winnow.wire.transfers import encode, expected, make_layer
from winnow.distributed.heads import take_heads
from winnow.errors import TransferMalformed, TransferMismatch
from winnow.kv import KvDtype, LayerKV, ModelShape
from winnow.v1 import decode_pb2 as pb
from winnow.wire import TransferDecoder, read_header

SHAPE = ModelShape(2, 8, 4, 8, 32, torch.float32)
LAYERS = [make_layer(SHAPE, idx, (4, 5 + idx, 0, 7)) for idx in range(2)]
HEADS = range(1, 3)


def part(heads: range | None = HEADS, kv_dtype: KvDtype = "auto") -> list[bytes]:
    layers = LAYERS if heads is None else [take_heads(layer, heads) for layer in LAYERS]
    return encode(layers, torch.ones(32), SHAPE, kv_dtype=kv_dtype, heads=heads)


def decoder(own: range | None) -> TransferDecoder:
    return TransferDecoder(replace(expected(SHAPE), heads=own))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_part_arrives_with_its_heads(kv_dtype: KvDtype) -> None:
    receiver, layers = decoder(range(4)), []
    for frame in part(kv_dtype=kv_dtype):
        if isinstance(event := receiver.feed(frame), LayerKV):
            layers.append((event.head_lengths, event.window_queries.clone()))
    assert receiver.complete
    for (lengths, queries), whole in zip(layers, LAYERS, strict=True):
        assert lengths == whole.head_lengths[1:3]
        assert torch.equal(queries, whole.window_queries[2:6])


@pytest.mark.parametrize(
    ("sent", "own", "said"),
    [
        (HEADS, None, "a part, of KV heads 1 to 2; all heads are due"),
        (None, range(4), "of all KV heads; this rank has KV heads 0 to 3"),
        (HEADS, range(2), "of KV heads 1 to 2; this rank has KV heads 0 to 1"),
        (HEADS, range(2, 4), "of KV heads 1 to 2; this rank has KV heads 2 to 3"),
    ],
)
def test_refuses_other_heads_than_its_own(sent: range | None, own: range | None, said: str) -> None:
    with pytest.raises(TransferMismatch, match=said):
        decoder(own).feed(part(sent)[0])


def test_refuses_entries_of_more_heads_than_the_header_says() -> None:
    receiver = decoder(range(4))
    receiver.feed(part()[0])
    with pytest.raises(TransferMalformed, match="announces 4 KV heads; the part has 2"):
        receiver.feed(part(None)[1])


@pytest.mark.parametrize(("first", "count"), [(3, 2), (4, 1), (5, 0), (0, 5), (1, 0)])
def test_refuses_heads_that_the_model_does_not_have(first: int, count: int) -> None:
    frame = pb.PushFrame.FromString(part(None)[0])
    frame.header.first_kv_head, frame.header.num_part_kv_heads = first, count
    with pytest.raises(TransferMalformed, match="the model has 4"):
        read_header(frame.SerializeToString())
