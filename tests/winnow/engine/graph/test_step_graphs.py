"""Which steps are recorded, and what happens where they cannot be."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models_in_code import FAMILIES
from tests.winnow.drive import GREEDY, admit, decode_all, ids, make_engine, prompt, spec
from tests.winnow.eager_recorder import EagerRecorder, EagerRecording
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import Recorder, recorder_for
from winnow.engine.graph.cuda import CudaRecorder
from winnow.engine.graph.step_graphs import batch_sizes
from winnow.models import load_model

LENGTHS = (1, 16, 33, 90)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["qwen3"])


def answers(engine: DecodeEngine) -> dict[str, list[int]]:
    for length in LENGTHS:
        admit(engine, spec(str(length), length, GREEDY), prompt(length, length))
    return {name: ids(tokens) for name, tokens in decode_all(engine).items()}


@pytest.mark.parametrize(
    ("max_batch_size", "sizes"),
    [
        (1, [1]),
        (5, [1, 2, 4, 5]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]),
    ],
)
def test_batches_are_padded_to_one_of_a_ladder_of_sizes(
    max_batch_size: int, sizes: list[int]
) -> None:
    assert batch_sizes(max_batch_size) == sizes


def test_of_the_largest_batches_no_step_is_recorded() -> None:
    sizes = batch_sizes(4096)
    assert (len(sizes), sizes[-1]) == (23, 512)


def test_only_a_cuda_device_has_a_recorder_unless_it_is_switched_off() -> None:
    assert recorder_for(torch.device("cuda")) is CudaRecorder
    assert recorder_for(torch.device("cuda"), "off") is None
    assert recorder_for(torch.device("cpu")) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recorded_and_gives_the_same_tokens(
    tiny_models: dict[str, Path], family: str
) -> None:
    own = load_model(tiny_models[family])
    engine = make_engine(own, rows=6, new_recorder=EagerRecorder)
    assert engine._runner.reads_late
    assert answers(engine) == answers(make_engine(own))


def test_a_head_that_outgrows_the_table_on_the_device_has_steps_recorded_again(
    model: DecoderModel,
) -> None:
    """128 pages of 4 entries are as wide as the table is at first."""
    made: list[EagerRecorder] = []

    def new_recorder() -> EagerRecorder:
        made.append(EagerRecorder())
        return made[-1]

    engine = make_engine(model, rows=4, page_size=4, new_recorder=new_recorder)
    plain = make_engine(model, page_size=4)
    for one in (engine, plain):
        admit(one, spec("short", 20, GREEDY), prompt(20))
        admit(one, spec("long", 505, GREEDY), prompt(505))
    assert decode_all(engine) == decode_all(plain)
    assert [len(recorder.recordings) for recorder in made] == [3, 1]
    assert answers(engine) == answers(plain)


class NoRecorder:
    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


class NoCompiler:
    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        raise TypeError("at 7:12: no kernel could be compiled")


class Forgetful(EagerRecording):
    """Replays what it computed first, as where an input was not read from where it lies."""

    def replay(self) -> tuple[Tensor, ...]:
        return self._outputs


class ForgetfulRecorder:
    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> EagerRecording:
        return Forgetful(step)


@pytest.mark.parametrize(
    ("new_recorder", "reason"),
    [
        (NoRecorder, "operation not permitted when stream is capturing"),
        (ForgetfulRecorder, "at batch size 4 its logits are .* off; the limit is 0.02"),
    ],
)
def test_where_steps_cannot_be_recorded_they_are_launched_and_one_line_says_so(
    model: DecoderModel,
    caplog: pytest.LogCaptureFixture,
    new_recorder: Callable[[], NoRecorder],
    reason: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = make_engine(model, rows=4, new_recorder=new_recorder)
    (record,) = caplog.records
    start = "decode runs without CUDA graphs, because a step cannot be recorded: "
    assert re.fullmatch(start + reason, record.getMessage())
    assert not engine._runner.reads_late
    assert answers(engine) == answers(make_engine(model))


def test_a_step_that_makes_the_host_wait_is_not_captured(
    model: DecoderModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that fails leaves PyTorch's allocator in a state that costs memory."""

    @contextlib.contextmanager
    def refusing(_: torch.device) -> Iterator[None]:
        yield
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr("winnow.engine.graph.step_graphs.refusing_waits", refusing)
    recorders: list[EagerRecorder] = []

    def new_recorder() -> EagerRecorder:
        recorders.append(EagerRecorder())
        return recorders[-1]

    with caplog.at_level(logging.WARNING):
        engine = make_engine(model, rows=4, new_recorder=new_recorder)
    (record,) = caplog.records
    assert record.getMessage().endswith("called a synchronizing CUDA operation")
    assert recorders == []
    assert answers(engine) == answers(make_engine(model))


@pytest.mark.parametrize("second", [NoRecorder, NoCompiler])
def test_where_steps_cannot_be_recorded_again_the_rest_is_launched(
    model: DecoderModel, caplog: pytest.LogCaptureFixture, second: Callable[[], Recorder]
) -> None:
    recorders: list[Recorder] = [EagerRecorder(), second()]
    engine = make_engine(model, rows=4, page_size=4, new_recorder=lambda: recorders.pop(0))
    plain = make_engine(model, page_size=4)
    for one in (engine, plain):
        admit(one, spec("short", 20, GREEDY), prompt(20))
        admit(one, spec("long", 505, GREEDY), prompt(505))
    assert decode_all(engine) == decode_all(plain)
    assert not engine._runner.reads_late
    assert len(caplog.records) == 1


def test_a_batch_beyond_the_largest_recording_is_launched(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.engine.graph.step_graphs._MOST", 2)
    engine = make_engine(model, rows=6, new_recorder=EagerRecorder)
    assert answers(engine) == answers(make_engine(model))
    assert engine._runner.reads_late
