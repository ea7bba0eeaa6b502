import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.decode.active_request import Move
from services.decode.admission import Admission
from services.decode.engine_thread import EngineThread
from services.decode.metrics import DecodeMetrics
from tests.deadlines import SOON_S
from tests.services.decode.client import GREEDY, PROMPT
from tests.winnow.drive import UNPRUNED, admit, make_engine, prefill_all, spec
from tests.winnow.eager_recorder import EagerRecorder
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.outputs import StepOutput
from winnow.engine.page_storage import PageStorage
from winnow.engine.runner import LaunchedStep
from winnow.engine.sequence import Sequence
from winnow.errors import EngineFailed, NotFinite, WinnowError
from winnow.models import load_model
from winnow.sampling_params import SamplingParams
from winnow.wire import WIRE_VERSIONS, Grant, Trailer


class BreaksOnce(DecodeEngine):
    """An engine whose first step has a bug."""

    broken = True

    def step(self) -> list[StepOutput]:
        if self.broken:
            self.broken = False
            raise ZeroDivisionError("a bug")
        return super().step()


async def test_a_broken_step_fails_its_requests_and_the_thread_goes_on(
    tiny_models: dict[str, Path],
) -> None:
    model = load_model(tiny_models["llama"])
    engine = BreaksOnce(model, pool_config=KVPoolConfig(16 << 20, 16))
    posted: asyncio.Queue[WinnowError | list[StepOutput]] = asyncio.Queue()
    thread = EngineThread(engine, DecodeMetrics("tiny"), posted.put_nowait, posted.put_nowait)
    thread.start()
    try:
        admit(engine, spec("r1", len(PROMPT), GREEDY), PROMPT)
        failure = await posted.get()
        assert isinstance(failure, EngineFailed)
        assert "a bug" in failure.message
        outputs = await posted.get()
        assert isinstance(outputs, list)
        assert outputs[0].request_id == "r1"
    finally:
        await thread.stop()
    assert not thread.alive
    assert "winnow-decode-engine" not in {t.name for t in threading.enumerate()}


async def test_a_request_that_moves_has_said_its_last_token(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker goes on after the last token, so nobody would read one that came later."""
    model = load_model(tiny_models["llama"])
    engine = make_engine(model, rows=4, new_recorder=EagerRecorder)
    admission = Admission(engine)
    thread = EngineThread(engine, DecodeMetrics("tiny"), admission.deliver, admission.fail_all)
    layers, result = prefill_all(model, PROMPT, UNPRUNED)
    requests = {}
    for name in ("stays", "moves"):
        long = spec(name, len(PROMPT), replace(GREEDY, max_tokens=4000))
        request = requests[name] = await admission.admit(long, Grant.issue(WIRE_VERSIONS))
        request.begin_attempt(1, lambda: None)
        for layer in layers:
            request.write_layer(1, layer)
        request.arrive(1, Trailer(result.final_hidden, result.report))
    moving, has_left = requests["moves"], threading.Event()
    launch = engine._runner.launch

    def launch_late(batch: list[Sequence], unread: LaunchedStep | None) -> LaunchedStep:
        """A step without the request takes until the request has been seen to leave."""
        if len(batch) == 1:
            has_left.wait(SOON_S)
        return launch(batch, unread)

    def give_away() -> list[int]:
        with moving.given_away() as (seq,):
            has_left.set()
            return list(seq.state().token_ids)

    thread.start()
    try:
        async with asyncio.timeout(SOON_S):
            events = [await moving.events.get() for _ in range(4)]
            monkeypatch.setattr(engine._runner, "launch", launch_late)
            known = await asyncio.to_thread(give_away)
            while events[-1] is not Move.OVER:
                events.append(await moving.events.get())
    finally:
        has_left.set()
        await thread.stop()
    outputs = [event for event in events if isinstance(event, StepOutput)]
    assert [token.token_id for output in outputs for token in output.tokens] == known
    assert events[-2:] == [Move.BEGUN, Move.OVER]
    assert moving.events.empty()


class AlwaysBreaks(DecodeEngine):
    """An engine on a device that has failed."""

    def step(self) -> list[StepOutput]:
        raise RuntimeError("device-side assert")


async def test_the_thread_ends_when_step_after_step_fails(tiny_models: dict[str, Path]) -> None:
    model = load_model(tiny_models["llama"])
    engine = AlwaysBreaks(model, pool_config=KVPoolConfig(16 << 20, 16))
    failures: list[WinnowError] = []
    thread = EngineThread(engine, DecodeMetrics("tiny"), lambda outputs: None, failures.append)
    thread.start()
    admit(engine, spec("r1", len(PROMPT), GREEDY), PROMPT)
    await thread.wait_until_ended()
    assert "device-side assert" in failures[0].message
    assert failures[-1].message == "the decode engine has ended"
    await thread.stop()
    assert not thread.alive


class Worker:
    """An engine with its thread, and what it posted."""

    def __init__(self, model: DecoderModel) -> None:
        self.engine = DecodeEngine(model, pool_config=KVPoolConfig(16 << 20, 16))
        self.layers, self.result = prefill_all(model, PROMPT, UNPRUNED)
        self._outputs: asyncio.Queue[list[StepOutput]] = asyncio.Queue()
        self.thread = EngineThread(
            self.engine, DecodeMetrics("tiny"), self._outputs.put_nowait, lambda error: None
        )
        self.thread.start()

    def run(
        self,
        request_id: str,
        final_hidden: torch.Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        """A request whose KV was computed elsewhere."""
        reservation = self.engine.reserve(spec(request_id, len(PROMPT), sampling))
        for layer in self.layers:
            reservation.write_layer(layer)
        hidden = self.result.final_hidden if final_hidden is None else final_hidden
        self.engine.start(reservation, hidden, self.result.report.next_position)

    async def next_output(self) -> StepOutput:
        """Of the only request that runs."""
        async with asyncio.timeout(SOON_S):
            (output,) = await self._outputs.get()
            return output


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["llama"])


def out_of_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


async def test_the_thread_ends_when_every_batch_fails_though_the_device_lives(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(model)
    monkeypatch.setattr(DecoderModel, "layer", out_of_memory)
    for idx in range(10):
        assert worker.thread.alive
        worker.run(str(idx))
        assert (await worker.next_output()).error is None  # a first token takes no layer
        assert "out of memory" in str((await worker.next_output()).error)
    async with asyncio.timeout(60):
        await worker.thread.wait_until_ended()
    await worker.thread.stop()


# What asks the device something, of a pool.
_DEVICE_CALLS = ("begin_step", "plan_step", "place_queries", "read_layer", "write_layer")


def dies(*_: object) -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


def kill_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that the device takes part in fails from now on."""
    for name in _DEVICE_CALLS:
        monkeypatch.setattr(KVPool, name, dies)
    monkeypatch.setattr(PageStorage, "blank", dies)
    monkeypatch.setattr(DecoderModel, "layer", dies)
    monkeypatch.setattr(DecoderModel, "logits", dies)


async def test_the_thread_ends_with_a_device_that_dies_under_the_only_request(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(model)
    worker.run("only", sampling=replace(GREEDY, max_tokens=4000))
    await worker.next_output()
    kill_device(monkeypatch)
    async with asyncio.timeout(60):
        await worker.thread.wait_until_ended()
    await worker.thread.stop()
    stats = worker.engine.stats()
    assert (stats.running_sequences, stats.pool.pages_reserved) == (0, 0)


async def test_the_thread_ends_with_a_device_that_takes_no_kv(
    model: DecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(model)
    kill_device(monkeypatch)
    worker.engine.note_failure()  # as a transfer does
    async with asyncio.timeout(60):
        await worker.thread.wait_until_ended()
    await worker.thread.stop()


async def test_requests_with_broken_numbers_do_not_end_the_thread(model: DecoderModel) -> None:
    worker = Worker(model)
    for idx in range(12):
        worker.run(str(idx), worker.result.final_hidden * float("nan"))
        assert isinstance((await worker.next_output()).error, NotFinite)
    assert worker.thread.alive
    await worker.thread.stop()
