"""A push against a receiver that takes nothing."""

import threading
import time
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from services.prefill.channels import Channels
from services.prefill.sender import (
    HELD_AFTER_S,
    LAYERS_AHEAD,
    STALL_TIMEOUT_S,
    Delivered,
    Push,
)
from services.prefill.work import Work
from tests.deadlines import SOON_S
from tests.services.prefill.conftest import NUM_TOKENS, PRUNING, MakeJob, until
from tests.services.prefill.receiver import GRANT, Receiver
from tests.winnow.drive import prefill_all
from tests.winnow.engine.late_copies import LateCopies
from winnow.decoder import DecoderModel
from winnow.engine.outgoing import OutgoingBuffers
from winnow.engine.prefill import PrefillResult, PrefillRun
from winnow.errors import DeliveryFailed, PrefillFailed, RequestCancelled, WinnowError
from winnow.wire import Header, TransferEncoder


def encoder(model: DecoderModel) -> TransferEncoder:
    header = Header("r1", 1, GRANT.ticket(1), model.fingerprint, model.shape, NUM_TOKENS)
    return TransferEncoder(header)


def hand_over(push: Push, model: DecoderModel) -> PrefillResult:
    layers, result = prefill_all(model, range(1, NUM_TOKENS + 1), PRUNING)
    for layer in layers:
        push.send(layer)
    return result


@pytest.fixture
def ends() -> "SimpleQueue[Delivered | WinnowError]":
    return SimpleQueue()


def test_a_stalled_worker_stops_the_engine_s_wait(
    model: DecoderModel, ends: "SimpleQueue[Delivered | WinnowError]"
) -> None:
    push = Push("127.0.0.1:1", encoder(model), ends.put, stall_timeout_s=0.2)
    layers, _ = prefill_all(model, range(1, NUM_TOKENS + 1), PRUNING)
    started_s = time.monotonic()
    with pytest.raises(PrefillFailed, match=r"took no KV for 0.2 s"):
        for layer in layers:  # the call is never opened, so nobody takes them
            push.send(layer)
    assert len(layers) > LAYERS_AHEAD
    assert 0.2 <= time.monotonic() - started_s < 10


def test_a_held_prompt_is_passed_over_until_it_stalls(
    model: DecoderModel,
    ends: "SimpleQueue[Delivered | WinnowError]",
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s)
    monkeypatch.setattr("services.prefill.sender.time", clock)
    push = Push("127.0.0.1:1", encoder(model), ends.put)  # nobody takes its layers
    work = Work(make_job(), 1, 1, 0, push=push)
    layers, _ = prefill_all(model, range(1, NUM_TOKENS + 1), PRUNING)
    for layer in layers[:LAYERS_AHEAD]:
        assert push.wait_for_room()
        push.send(layer)
    assert not push.wait_for_room()
    assert work.can_go_on  # its layers may leave in a moment
    now_s = HELD_AFTER_S
    assert not work.can_go_on
    now_s = STALL_TIMEOUT_S
    assert work.can_go_on  # to end
    with pytest.raises(DeliveryFailed, match="took no KV for 15 s"):
        push.send(layers[LAYERS_AHEAD])


def test_a_worker_that_takes_everything_and_says_nothing_is_not_waited_for(
    model: DecoderModel,
    ends: "SimpleQueue[Delivered | WinnowError]",
    make_job: MakeJob,
    receiver: Receiver,
) -> None:
    released = threading.Event()

    def wait(layer_idx: int) -> None:
        released.wait(30)

    receiver.before_layer = wait
    channels = Channels()
    push = Push(receiver.address, encoder(model), ends.put, stall_timeout_s=0.5)
    push.open(channels, timeout_s=30)
    push.finish(hand_over(push, model))
    end = ends.get(timeout=SOON_S)
    released.set()
    assert isinstance(end, DeliveryFailed)
    assert ends.empty()
    channels.close()


def test_aborting_wakes_the_engine_and_the_receiver(
    model: DecoderModel,
    ends: "SimpleQueue[Delivered | WinnowError]",
    make_job: MakeJob,
    receiver: Receiver,
) -> None:
    channels = Channels()
    push = Push(receiver.address, encoder(model), ends.put)
    push.open(channels, timeout_s=30)
    abort = threading.Timer(0.1, push.abort, [RequestCancelled("gone")])
    abort.start()
    end = ends.get(timeout=30)
    assert isinstance(end, RequestCancelled)
    with pytest.raises(RequestCancelled, match="gone"):
        layer = PrefillRun(model, range(1, NUM_TOKENS + 1), PRUNING, is_long=False).compute_layer()
        assert layer is not None
        push.send(layer)
    abort.join()
    assert ends.empty()
    channels.close()


def test_layers_leave_from_buffers_that_are_all_given_back(
    model: DecoderModel, ends: "SimpleQueue[Delivered | WinnowError]", receiver: Receiver
) -> None:
    stream = LateCopies()
    buffers, channels = OutgoingBuffers(stream, LAYERS_AHEAD + 2), Channels()
    layers, result = prefill_all(model, range(1, NUM_TOKENS + 1), PRUNING)
    for _ in range(3):
        push = Push(receiver.address, encoder(model), ends.put, buffers=buffers)
        push.open(channels, timeout_s=30)
        push.finish(hand_over(push, model))
        assert isinstance(ends.get(timeout=30), Delivered)
    until(lambda: buffers.num_used == 0)
    assert len(buffers._free) <= LAYERS_AHEAD + 2
    for received, sent in zip(receiver.layers, 3 * layers, strict=True):
        assert torch.equal(received.keys, sent.keys)
        assert torch.equal(received.positions, sent.positions)
    assert torch.equal(receiver.trailers[-1].final_hidden, result.final_hidden)
    channels.close()


def test_a_push_that_is_aborted_gives_its_buffers_back(
    model: DecoderModel, ends: "SimpleQueue[Delivered | WinnowError]", receiver: Receiver
) -> None:
    """While a layer is being sent and others wait, and for one that comes too late."""
    reached, released = threading.Event(), threading.Event()

    def wait(layer_idx: int) -> None:
        reached.set()
        released.wait(SOON_S)

    receiver.before_layer = wait
    buffers, channels = OutgoingBuffers(LateCopies(), LAYERS_AHEAD + 2), Channels()
    push = Push(receiver.address, encoder(model), ends.put, buffers=buffers)
    push.open(channels, timeout_s=30)
    layers, result = prefill_all(model, range(1, NUM_TOKENS + 1), PRUNING)
    for layer in layers[:LAYERS_AHEAD]:
        push.send(layer)
    assert reached.wait(SOON_S)
    push.abort(RequestCancelled("gone"))
    with pytest.raises(RequestCancelled):
        push.send(layers[-1])
    push.finish(result)
    assert isinstance(ends.get(timeout=SOON_S), RequestCancelled)
    released.set()
    until(lambda: buffers.num_used == 0)
    channels.close()


def test_a_device_that_fails_while_it_copies_ends_the_push(
    model: DecoderModel, ends: "SimpleQueue[Delivered | WinnowError]", receiver: Receiver
) -> None:
    stream = LateCopies()
    stream.error = RuntimeError("the device is gone")
    buffers, channels = OutgoingBuffers(stream, LAYERS_AHEAD + 2), Channels()
    push = Push(receiver.address, encoder(model), ends.put, buffers=buffers)
    push.open(channels, timeout_s=30)
    layers, _ = prefill_all(model, range(1, NUM_TOKENS + 1), PRUNING)
    push.send(layers[0])
    assert isinstance(ends.get(timeout=SOON_S), PrefillFailed)
    until(lambda: buffers.num_used == 0)
    channels.close()


def test_a_channel_is_kept_for_the_next_push_and_dropped_when_lost(receiver: Receiver) -> None:
    channels = Channels()
    first = channels.borrow(receiver.address)
    channels.give_back(first, lost=False)
    assert channels.borrow(receiver.address) is first
    channels.give_back(first, lost=True)
    second = channels.borrow(receiver.address)
    assert second is not first
    channels.give_back(second, lost=False)
    channels.close()


def test_a_lost_channel_goes_to_nobody_else_while_others_still_use_it(receiver: Receiver) -> None:
    channels = Channels()
    first = channels.borrow(receiver.address)
    assert channels.borrow(receiver.address) is first
    channels.give_back(first, lost=True)
    second = channels.borrow(receiver.address)
    assert second is not first
    channels.give_back(first, lost=False)
    assert channels.borrow(receiver.address) is second
    channels.close()
