"""Two ranks that replay steps, and read them late, give what one process gives that does not."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.winnow.distributed.conftest import TwoRanks
from tests.winnow.drive import (
    GREEDY,
    UNPRUNED,
    admit,
    assert_empty,
    decode_all,
    prefill_all,
    prompt,
    spec,
)
from tests.winnow.eager_recorder import EagerRecorder, EagerRecording
from tests.winnow.events import Answers, Events, joining, moved, run
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import Recorder
from winnow.engine.sequence import Reservation
from winnow.kv import LayerKV
from winnow.sampling_params import SamplingParams

SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, seed=7, ignore_eos=True)
CUT = {"decode_budget": 24, "recompress_interval": 4}


def recorded(
    two: TwoRanks, new_recorder: Callable[[], Recorder] = EagerRecorder, **more: Any
) -> DecodeEngine:
    return two.engine(is_split=True, new_recorder=new_recorder, **more)


def join_from(
    model: DecoderModel, name: str, length: int, sampling: SamplingParams, **more: Any
) -> Callable[..., Reservation]:
    return joining(name, length, sampling, model, **more)


def require_equal(two: TwoRanks, events: Events, **more: Any) -> Answers:
    expected = run(two.engine(is_split=False), events)
    engine = recorded(two, **more)
    assert engine._runner.reads_late
    assert run(engine, events) == expected
    assert engine._runner.reads_late
    assert two.lost == []
    return expected


def test_requests_join_and_end_at_different_steps(two: TwoRanks) -> None:
    join = partial(join_from, two.single)
    free = run(two.engine(is_split=False), {0: join("free", 20, SAMPLED, **CUT)})["free"][0]
    stopping = replace(SAMPLED, stop_token_ids=frozenset({free[7].token_id}), min_tokens=3)
    answers = require_equal(
        two,
        {
            0: join("greedy", 40, GREEDY),
            2: join("sampled", 17, replace(SAMPLED, top_p=0.9), num_sequences=3),
            5: join("penalized", 64, replace(SAMPLED, presence_penalty=0.7, max_tokens=4)),
            7: join("stops", 20, stopping, **CUT),
            9: join("cut", 60, SAMPLED, **CUT),
            40: join("last", 100, replace(GREEDY, max_tokens=1)),
        },
    )
    assert len(answers) == 6
    assert len(answers["stops"][0]) <= 8
    assert answers["cut"][1] > 0


def test_a_cancelled_request_says_no_more_and_its_rows_go_to_others(two: TwoRanks) -> None:
    join = partial(join_from, two.single)
    cancelled: list[Reservation] = []
    events: Events = {
        0: join("stays", 40, SAMPLED),
        1: lambda e: cancelled.append(join("leaves", 60, SAMPLED, num_sequences=2, **CUT)(e)),
        6: lambda e: e.release(cancelled.pop()),
        8: join("takes its rows", 20, SAMPLED, num_sequences=4),
    }
    assert require_equal(two, events).keys() == {"stays", "takes its rows"}


def test_sequences_that_had_to_wait_get_their_own_tokens(two: TwoRanks) -> None:
    long = replace(SAMPLED, max_tokens=60)
    join = partial(join_from, two.single)
    events: Events = {0: lambda e: [join(str(n), 60 + n, long)(e) for n in range(3)]}
    expected = run(two.engine(is_split=False), events)
    page_bytes = 16 * (two.single.shape.kv_bytes(1) + 4)
    engine = recorded(two, memory=2 * 70 * page_bytes, overcommit=3.0, swap_bytes=64 << 20)
    assert run(engine, events) == expected
    assert engine.preemption_stats.swapped_out > 0


def test_a_request_moves_to_one_process_and_back(two: TwoRanks) -> None:
    request = spec("moves", 40, replace(SAMPLED, presence_penalty=0.5), **CUT)
    single = partial(two.engine, is_split=False)
    admitted = partial(admit, request=request, token_ids=prompt(40), model=two.single)
    alone = run(single(), {0: admitted})["moves"][0]
    hidden = prefill_all(two.single, prompt(40), UNPRUNED)[1].final_hidden
    for origin, goal in ((partial(recorded, two), single), (single, partial(recorded, two))):
        engine = origin()
        said, state, layers = moved(engine, request, 7, two.single)
        assert [token.token_id for token in said] == list(state.token_ids)
        assert_empty(engine)
        engine = goal()
        reservation = engine.reserve(replace(request, moved=True))
        for layer in layers:
            reservation.write_layer(layer)
        engine.resume(reservation, {0: state}, hidden)
        joins = joining("joins", 17, SAMPLED, two.single)
        assert said + run(engine, {0: joins})["moves"][0] == alone


def test_a_step_begins_before_the_last_one_is_read(two: TwoRanks) -> None:
    engine = recorded(two)
    admit(engine, spec("r", 20, replace(GREEDY, max_tokens=8)), prompt(20), model=two.single)
    counts = [sum(len(output.tokens) for output in engine.step()) for _ in range(9)]
    assert counts == [0, *[1] * 8]
    assert_empty(engine)


def long_on_rank_1(two: TwoRanks, engine: DecodeEngine) -> None:
    """A request whose head on rank 1 outgrows the table on the device, of 128 pages, of 4."""
    layers, result = prefill_all(two.single, prompt(505), UNPRUNED)
    reservation = engine.reserve(spec("long", 505, GREEDY))
    for layer in layers:
        reservation.write_layer(short_on_rank_0(layer))
    engine.start(reservation, result.final_hidden, result.report.next_position)


def short_on_rank_0(layer: LayerKV) -> LayerKV:
    rows = slice(500, None)
    return replace(
        layer,
        keys=layer.keys[rows],
        values=layer.values[rows],
        positions=layer.positions[rows],
        head_lengths=(5, 505),
    )


def test_both_ranks_record_again_where_a_head_of_one_outgrows_the_table(two: TwoRanks) -> None:
    events: Events = {0: partial(long_on_rank_1, two), 2: joining("short", 20, SAMPLED, two.single)}
    expected = run(two.engine(is_split=False, page_size=4), events)
    engine = recorded(two, page_size=4)
    assert run(engine, events) == expected
    assert engine._runner.reads_late
    assert engine.pool.mirror.width == 256


class Fails(EagerRecorder):
    """Cannot record on rank 1."""

    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        recording = super().record(step)
        if dist.get_rank() == 1:
            raise TypeError("operation not permitted\nwhen stream is capturing")
        return recording


class Forgetful(EagerRecording):
    """Replays what it computed first on rank 1."""

    def replay(self) -> tuple[Tensor, ...]:
        before = [output.clone() for output in self._outputs]
        new = super().replay()
        return new if dist.get_rank() == 0 else tuple(before)


class ForgetfulRecorder:
    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        return Forgetful(step)


class FailsAgain(Fails):
    """Cannot record on rank 1 but the first of its kind."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        FailsAgain.made += 1

    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        return super().record(step) if FailsAgain.made > 1 else EagerRecorder.record(self, step)


@pytest.mark.parametrize(
    ("new_recorder", "reason"),
    [
        (Fails, "rank 1: operation not permitted when stream is capturing"),
        (ForgetfulRecorder, "rank 1: at batch size 8 its logits are"),
        (FailsAgain, "rank 1: operation not permitted when stream is capturing"),
    ],
)
def test_where_one_rank_cannot_record_all_launch_steps_and_one_line_says_so(
    two: TwoRanks,
    caplog: pytest.LogCaptureFixture,
    new_recorder: Callable[[], Recorder],
    reason: str,
) -> None:
    engine = recorded(two, new_recorder, page_size=4)
    assert engine._runner.reads_late is (new_recorder is FailsAgain)
    plain = two.engine(is_split=False, page_size=4)
    for one in (engine, plain):
        long_on_rank_1(two, one)
    assert decode_all(engine) == decode_all(plain)
    assert not engine._runner.reads_late
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    start = "decode runs without CUDA graphs, because a step cannot be recorded: "
    assert line.startswith(start + reason)
