"""Two ranks of prefill push to decode's, each the heads that both have."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
import torch

from services.prefill.channels import Channels
from services.prefill.parts import Outcome, plan_parts
from services.prefill.rank import EXTENSION, HasRoom, Moved
from services.prefill.sender import LAYERS_AHEAD, Delivered
from services.prefill.split_push import SplitPush
from services.prefill.transfers import Shipping
from tests.deadlines import SOON_S
from tests.models_in_code import save_tiny_model
from tests.services.prefill.conftest import until
from tests.services.prefill.receiver import GRANT, Receiver
from tests.winnow.drive import prefill_all, prompt
from winnow.distributed.heads import join_heads
from winnow.distributed.loading import load_on_ranks
from winnow.distributed.split_decoder import SplitDecoder
from winnow.engine.outgoing import OutgoingBuffers
from winnow.engine.prefill import PrefillRun
from winnow.errors import (
    DeliveryFailed,
    EngineFailed,
    PrefillFailed,
    RequestCancelled,
    TransferDamaged,
)
from winnow.kv import KvDtype, ModelShape
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings
from winnow.wire import Header

TOKENS = prompt(100)
TOP_P = PruningSettings(
    method="snapkv", compression="top_p", window_size=8, kernel_size=3, kv_top_p=0.6
)


class Prefill:
    """A model of four KV heads on two ranks, and what one of them sends alone."""

    def __init__(self, folder: Path) -> None:
        save_tiny_model(folder, "qwen2", num_key_value_heads=4)
        self.expected, self.result = prefill_all(load_model(folder), TOKENS, TOP_P)
        self.lost: list[str] = []
        own, self.ranks = load_on_ranks(folder, 2, self.lost.append, extension=EXTENSION)
        self.model = SplitDecoder(own, self.ranks)
        self.shipping = Shipping(self.ranks, None)
        self.channels = Channels()
        self.ends: SimpleQueue[Outcome] = SimpleQueue()

    def close(self) -> None:
        self.channels.close()
        self.ranks.close()

    def header(self, kv_dtype: KvDtype = "auto") -> Header:
        return Header(
            "r1",
            1,
            GRANT.ticket(1),
            self.model.fingerprint,
            self.model.shape,
            len(TOKENS),
            kv_dtype=kv_dtype,
        )

    def push(self, receivers: list[Receiver], kv_dtype: KvDtype = "auto") -> SplitPush:
        """An open one."""
        header = self.header(kv_dtype)
        plan = plan_parts(header, 2, [receiver.address for receiver in receivers])
        assert plan is not None
        push = self.shipping.push(plan, self.ends.put, buffers=OutgoingBuffers(), trace_context="")
        push.open(self.channels, SOON_S)
        return push

    def compute(self, push: SplitPush, num_layers: int | None = None) -> PrefillRun:
        run = PrefillRun(self.model, TOKENS, TOP_P, pack=push.pack, is_long=False)
        for _ in range(num_layers or self.model.shape.num_layers):
            until(push.wait_for_room)
            layer = run.compute_layer()
            assert layer is not None
            push.send(layer)
        return run


def all_begin(receivers: list[Receiver]) -> None:
    """A call that ends before it has come to its receiver has no end there."""
    for receiver in receivers:
        assert receiver.call_begun.wait(SOON_S)


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefill]:
    prefill = Prefill(tmp_path_factory.mktemp("four_heads"))
    yield prefill
    prefill.close()


@pytest.fixture
def decode(prefill: Prefill) -> Iterator[Callable[[int], list[Receiver]]]:
    """Starts so many ranks of decode."""
    started: list[Receiver] = []

    def start(count: int) -> list[Receiver]:
        share = prefill.model.shape.num_kv_heads // count
        for rank in range(count):
            heads = range(rank * share, (rank + 1) * share)
            started.append(Receiver(prefill.model, len(TOKENS), heads))
        return started

    yield start
    for receiver in started:
        receiver.stop()


@pytest.mark.parametrize(("num_receivers", "kv_dtype"), [(2, "auto"), (4, "auto"), (4, "int8")])
def test_each_rank_of_decode_gets_its_heads_as_one_process_sends_them(
    prefill: Prefill,
    decode: Callable[[int], list[Receiver]],
    num_receivers: int,
    kv_dtype: KvDtype,
) -> None:
    receivers = decode(num_receivers)
    push = prefill.push(receivers, kv_dtype)
    push.finish(prefill.compute(push).result())
    assert isinstance(prefill.ends.get(timeout=SOON_S), Delivered)
    near = 1e-3 if kv_dtype == "auto" else 0.1
    for idx, expected in enumerate(prefill.expected):
        parts = [receiver.layers[idx] for receiver in receivers]
        found = join_heads(parts).dequantized(torch.float32)
        assert found.head_lengths == expected.head_lengths
        assert torch.equal(found.positions, expected.positions)
        torch.testing.assert_close(found.keys, expected.keys, rtol=near, atol=near)
        torch.testing.assert_close(
            found.window_queries, expected.window_queries, rtol=1e-3, atol=1e-3
        )
    hidden = [receiver.trailers[0].final_hidden for receiver in receivers]
    torch.testing.assert_close(hidden[0], prefill.result.final_hidden, rtol=1e-3, atol=1e-3)
    assert not any(other.any() for other in hidden[1:])
    assert not prefill.shipping._open


@pytest.mark.parametrize("refusing", [0, 1, 3])
def test_a_part_that_is_refused_ends_the_transfer_with_its_error(
    prefill: Prefill, decode: Callable[[int], list[Receiver]], refusing: int
) -> None:
    def refuse(layer_idx: int) -> None:
        if layer_idx == 1:
            all_begin(receivers)
            raise TransferDamaged("a checksum does not match")

    receivers = decode(4)
    receivers[refusing].before_layer = refuse
    push = prefill.push(receivers)
    with contextlib.suppress(TransferDamaged):  # if it comes while layers are left
        push.finish(prefill.compute(push).result())
    end = prefill.ends.get(timeout=SOON_S)
    assert isinstance(end, TransferDamaged)
    assert "a checksum does not match" in end.message
    for receiver in receivers:
        assert receiver.call_ended.wait(SOON_S)
    assert not receivers[0].trailers
    assert prefill.ends.empty()


class Clock:
    """In place of the module `time`, where a transfer reads it."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("sender", "split_push"):
        monkeypatch.setattr(f"services.prefill.{module}.time", clock)
    return clock


def test_layers_that_wait_on_another_rank_slow_the_prompt_down(
    prefill: Prefill, clock: Clock
) -> None:
    header = prefill.header()
    plan = plan_parts(header, 2, ["127.0.0.1:1", "127.0.0.1:2"])
    assert plan is not None
    push = SplitPush(
        prefill.ranks, 99, plan, prefill.ends.put, buffers=OutgoingBuffers(), stall_timeout_s=0.5
    )  # never opened, so nobody takes them
    run = PrefillRun(prefill.model, TOKENS, TOP_P, pack=push.pack, is_long=False)
    for _ in range(LAYERS_AHEAD):
        assert push.has_room
        run.compute_layer()
    assert not push.wait_for_room()
    push.take_news(1, HasRoom(99, 0))
    assert push.wait_for_room()
    run.compute_layer()
    assert not push.has_room
    clock.now_s += 0.5
    assert push.wait_for_room()  # to end
    with pytest.raises(DeliveryFailed, match=r"took no KV for 0.5 s"):
        run.compute_layer()
    assert isinstance(prefill.ends.get(timeout=SOON_S), DeliveryFailed)


def test_a_part_whose_frames_leave_does_not_stall(prefill: Prefill, clock: Clock) -> None:
    plan = plan_parts(prefill.header(), 2, ["127.0.0.1:1", "127.0.0.1:2"])
    assert plan is not None
    push = SplitPush(
        prefill.ranks, 98, plan, prefill.ends.put, buffers=OutgoingBuffers(), stall_timeout_s=0.5
    )
    run = PrefillRun(prefill.model, TOKENS, TOP_P, pack=push.pack, is_long=False)
    for _ in range(LAYERS_AHEAD):
        run.compute_layer()
    for _ in range(4):
        clock.now_s += 0.4
        push.take_news(1, Moved(98, 0))
        assert not push.has_room
    clock.now_s += 0.5
    assert push.has_room  # to end
    with pytest.raises(DeliveryFailed, match=r"worker 127.0.0.1:2 took no KV for 0.5 s"):
        run.compute_layer()
    prefill.ends.get(timeout=SOON_S)


def test_a_transfer_that_cannot_be_opened_leaves_nothing(
    prefill: Prefill, decode: Callable[[int], list[Receiver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    receivers = decode(2)

    def refuse(address: str) -> grpc.Channel:
        assert receivers[1].call_begun.wait(SOON_S)  # else there may be nothing to end
        raise OSError("no more channels")

    with monkeypatch.context() as patch:
        patch.setattr(prefill.channels, "borrow", refuse)
        with pytest.raises(OSError, match="no more channels"):
            prefill.push(receivers)
    assert not prefill.shipping._open
    assert receivers[1].call_ended.wait(SOON_S)  # of the other rank
    assert prefill.ends.empty()


def test_an_aborted_transfer_ends_all_its_calls(
    prefill: Prefill, decode: Callable[[int], list[Receiver]]
) -> None:
    receivers = decode(2)
    push = prefill.push(receivers)
    prefill.compute(push, num_layers=1)
    all_begin(receivers)
    push.abort(RequestCancelled("gone"))
    assert isinstance(prefill.ends.get(timeout=SOON_S), RequestCancelled)
    for receiver in receivers:
        assert receiver.call_ended.wait(SOON_S)
        assert not receiver.trailers
    with pytest.raises(RequestCancelled, match="gone"):
        prefill.compute(push, num_layers=1)


def test_ranks_that_share_no_heads_have_no_part() -> None:
    shape = ModelShape(2, 24, 12, 8, 32, torch.float32)
    header = Header("r1", 1, GRANT.ticket(1), "abc", shape, 10)

    def planned(num_ranks: int, num_receivers: int) -> list[list[tuple[int, range]]] | None:
        plan = plan_parts(header, num_ranks, [str(rank) for rank in range(num_receivers)])
        if plan is None:
            return None
        return [
            [(int(part.address), part.header.heads or range(0)) for part in own] for own in plan
        ]

    assert planned(2, 2) == [[(0, range(6))], [(1, range(6, 12))]]
    assert planned(2, 3) == [
        [(0, range(4)), (1, range(4, 6))],
        [(1, range(6, 8)), (2, range(8, 12))],
    ]
    assert planned(4, 2) == [
        [(0, range(3))],
        [(0, range(3, 6))],
        [(1, range(6, 9))],
        [(1, range(9, 12))],
    ]
    for num_ranks, num_receivers in ((1, 2), (2, 1), (2, 0), (2, 5), (12, 2)):
        assert planned(num_ranks, num_receivers) is None


def test_a_killed_rank_ends_the_transfer(
    prefill: Prefill, decode: Callable[[int], list[Receiver]]
) -> None:
    """The last test of this module: there are no two ranks afterwards."""
    receivers = decode(2)
    push = prefill.push(receivers)
    run = prefill.compute(push, num_layers=1)
    all_begin(receivers)
    os.kill(prefill.ranks.process_ids[0], signal.SIGKILL)
    with pytest.raises((EngineFailed, RuntimeError)):  # its end is noticed, or the sum breaks
        for _ in range(3):
            run.compute_layer()
    push.abort(PrefillFailed("a rank has ended"))
    assert isinstance(prefill.ends.get(timeout=SOON_S), PrefillFailed)
    for receiver in receivers:
        assert receiver.call_ended.wait(SOON_S)
        assert not receiver.trailers
    until(lambda: len(prefill.lost) == 1)
