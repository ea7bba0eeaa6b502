import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.winnow.wire.transfers import GRANT, NUM_PROMPT_TOKENS, make_layer
from winnow.distributed.arrivals import Arrival, Arrivals
from winnow.distributed.heads import take_heads
from winnow.errors import StaleAttempt, TransferDamaged, TransferMalformed
from winnow.kv import LayerKV, ModelShape
from winnow.wire import Expected

SHAPE = ModelShape(2, 8, 4, 8, 32, torch.float32)  # of which this rank has KV heads 1 to 3
LAYERS = [make_layer(SHAPE, idx, (4, 5 + idx, 0, 7)) for idx in range(2)]
HEADS = range(1, 4)


def arrival(write: Callable[[LayerKV], object] = lambda layer: None) -> Arrival:
    size = NUM_PROMPT_TOKENS
    return Arrival(Expected(GRANT, "abc", SHAPE, size, size, 8, heads=HEADS), write)


def give(to: Arrival, heads: range, layers: list[LayerKV] = LAYERS) -> None:
    with to.part(heads):
        for layer in layers:
            to.add(heads, take_heads(layer, heads))


def test_a_layer_is_written_when_its_last_part_has_come() -> None:
    written: list[LayerKV] = []
    to = arrival(written.append)
    with to.part(range(2, 4)):
        for layer in LAYERS:
            part = take_heads(layer, range(2, 4))
            to.add(range(2, 4), part)
            part.keys.zero_()  # the buffer is used again
        part.keys[:] = take_heads(LAYERS[-1], range(2, 4)).keys
    assert not written
    give(to, range(1, 2))
    assert [layer.layer_idx for layer in written] == [0, 1]
    for found, whole in zip(written, LAYERS, strict=True):
        expected = take_heads(whole, HEADS)
        assert found.head_lengths == expected.head_lengths
        assert torch.equal(found.positions, expected.positions)
        assert torch.equal(found.window_queries, expected.window_queries)
    assert to.head_lengths() == [(5, 0, 7), (6, 0, 7)]


def test_a_layer_that_comes_whole_is_written_as_it_is() -> None:
    written: list[LayerKV] = []
    to = arrival(written.append)
    layers = [take_heads(layer, HEADS) for layer in LAYERS]
    with to.part(HEADS):
        for layer in layers:
            to.add(HEADS, layer)
    assert all(found is layer for found, layer in zip(written, layers, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (LayerKV.quantized, "has int8 keys and 3 window queries of KV heads 2 to 3, and float32"),
        (
            lambda layer: replace(layer, window_queries=layer.window_queries[:, 1:]),
            "has float32 keys and 2 window queries of KV heads 2 to 3, and float32 keys and 3",
        ),
    ],
)
def test_parts_of_a_layer_are_alike(change: Callable[[LayerKV], LayerKV], reason: str) -> None:
    to = arrival()
    to.add(range(1, 2), take_heads(LAYERS[0], range(1, 2)))
    with pytest.raises(TransferMalformed, match=reason):
        to.add(range(2, 4), change(take_heads(LAYERS[0], range(2, 4))))


def test_the_same_heads_come_once() -> None:
    to = arrival()
    give(to, range(1, 3))
    with (
        pytest.raises(TransferDamaged, match="KV heads 2 to 3 arrive a second time"),
        to.part(range(2, 4)),
    ):
        pass


def test_a_part_that_breaks_off_is_missing() -> None:
    to = arrival()
    give(to, range(1, 3))
    with pytest.raises(ConnectionError), to.part(range(3, 4)):
        raise ConnectionError
    with pytest.raises(TransferDamaged, match=r"KV heads \[3\] did not arrive whole"):
        to.head_lengths()


def test_a_dropped_attempt_ends_its_calls_and_takes_no_more() -> None:
    cancelled: list[int] = []
    to = arrival()
    give(to, range(1, 2))
    with to.part(range(2, 3), lambda: cancelled.append(2)):
        to.drop()
        with pytest.raises(StaleAttempt):
            to.add(range(2, 3), take_heads(LAYERS[0], range(2, 3)))
    assert cancelled == [2]
    with pytest.raises(StaleAttempt), to.part(range(3, 4)):
        pass


def test_a_part_waits_for_its_attempt_to_begin() -> None:
    arrivals, to = Arrivals(), arrival()
    begin = threading.Timer(0.1, arrivals.expect, ["r1", 2, to])
    begin.start()
    assert arrivals.of("r1", 2, timeout_s=30) is to
    with pytest.raises(StaleAttempt, match="attempt 1 of request r1 did not begin within 0 s"):
        arrivals.of("r1", 1)
    arrivals.drop("r1", 2)
    with pytest.raises(StaleAttempt):
        arrivals.of("r1", 2)
