"""Decode on the cores of a prompt that is computed."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services.common.cores import SharedCores
from services.decode.engine_thread import EngineThread
from services.decode.metrics import DecodeMetrics
from tests.deadlines import SOON_S
from tests.services.common.prefill_process import prefill_process
from tests.services.decode.client import GREEDY, PROMPT
from tests.winnow.drive import admit, spec
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.outputs import StepOutput
from winnow.models import load_model

STEP_S = 0.004  # of CPU; less than a turn on a core that is shared
SHARE = 0.02
PERIOD_S = STEP_S / SHARE  # from the begin of a step to that of the next one


class BusyEngine(DecodeEngine):
    """One that always has work, of steps that take STEP_S of one core.

    begun_s: when each was begun.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.begun_s: list[float] = []

    def wait_for_work(self, timeout_s: float) -> bool:
        return True

    def step(self) -> list[StepOutput]:
        self.begun_s.append(time.monotonic())
        end_s = time.thread_time() + STEP_S
        while time.thread_time() < end_s:
            pass
        return super().step()


@pytest.fixture
def cores(tmp_path: Path) -> Iterator[SharedCores]:
    cores = SharedCores(tmp_path / "cores")
    yield cores
    cores.close()


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> DecoderModel:
    return load_model(tiny_models["llama"])


@contextlib.asynccontextmanager
async def running(
    engine: DecodeEngine, tmp_path: Path, share: float = SHARE
) -> AsyncIterator["asyncio.Queue[list[StepOutput]]"]:
    """The engine's thread on shared cores, of which it takes `share` of one; its outputs."""
    outputs: asyncio.Queue[list[StepOutput]] = asyncio.Queue()
    thread = EngineThread(
        engine,
        DecodeMetrics("tiny"),
        outputs.put_nowait,
        lambda error: None,
        cores=SharedCores(tmp_path / "cores"),
        num_cores=share,
    )
    thread.start()
    try:
        yield outputs
    finally:
        await thread.stop()


async def steps_in(engine: BusyEngine, seconds: float) -> int:
    await asyncio.sleep(STEP_S)  # the step that was begun before
    before = len(engine.begun_s)
    await asyncio.sleep(seconds)
    return len(engine.begun_s) - before


async def periods(engine: BusyEngine, number: int = 8) -> list[float]:
    """Seconds from step to step, shortest first; others on the machine make some longer."""
    before = len(engine.begun_s)
    async with asyncio.timeout(SOON_S):
        while len(engine.begun_s) < before + number + 2:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(STEP_S)
    begun_s = engine.begun_s[before + 1 : before + number + 2]
    return sorted(later - earlier for earlier, later in pairwise(begun_s))


@pytest.fixture
def engine(model: DecoderModel) -> BusyEngine:
    return BusyEngine(model, pool_config=KVPoolConfig(16 << 20, 16))


async def test_decode_keeps_to_its_share_while_a_prompt_is_computed(
    engine: BusyEngine, cores: SharedCores, tmp_path: Path
) -> None:
    async with running(engine, tmp_path):
        with cores.prefilling():
            beside = await periods(engine)
        alone = await periods(engine)
    assert 0.9 * PERIOD_S < beside[len(beside) // 2] < 4 * PERIOD_S
    assert alone[0] < PERIOD_S / 2


async def test_a_worker_with_the_whole_share_does_not_rest(
    engine: BusyEngine, cores: SharedCores, tmp_path: Path
) -> None:
    async with running(engine, tmp_path, share=1):
        with cores.prefilling():
            assert (await periods(engine))[0] < PERIOD_S / 2


async def test_a_stopped_prefill_worker_does_not_stop_decode(
    engine: BusyEngine, tmp_path: Path
) -> None:
    with prefill_process(tmp_path / "cores") as process:
        process.send_signal(signal.SIGSTOP)
        async with running(engine, tmp_path):
            assert await steps_in(engine, 2) >= 2


async def test_several_workers_each_keep_to_their_share(
    model: DecoderModel, cores: SharedCores, tmp_path: Path
) -> None:
    engines = [BusyEngine(model, pool_config=KVPoolConfig(16 << 20, 16)) for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(cores.prefilling())
        for engine in engines:
            await stack.enter_async_context(running(engine, tmp_path))
        counts = await asyncio.gather(*(steps_in(engine, 3) for engine in engines))
    assert min(counts) >= 2
    assert max(counts) <= 2 * min(counts) + 2


LONG = 0.00001  # of a core: a rest of minutes


async def test_the_end_of_the_prompt_ends_the_rest(
    engine: BusyEngine, cores: SharedCores, tmp_path: Path
) -> None:
    async with running(engine, tmp_path, LONG):
        with cores.prefilling():
            await steps_in(engine, 0.5)
            assert await steps_in(engine, 0.5) == 0
        assert await steps_in(engine, 1) > 2


async def test_a_prompt_that_is_ready_does_not_wait_for_the_rest(
    model: DecoderModel, cores: SharedCores, tmp_path: Path
) -> None:
    engine = DecodeEngine(model, pool_config=KVPoolConfig(16 << 20, 16), max_batch_size=4)
    async with running(engine, tmp_path, LONG) as outputs, asyncio.timeout(SOON_S):
        with cores.prefilling():
            for request_id in ("first", "second", "third"):
                admit(engine, spec(request_id, len(PROMPT), GREEDY), PROMPT)
                while request_id not in {output.request_id for output in await outputs.get()}:
                    pass


async def test_memory_is_given_back_in_the_rest(
    model: DecoderModel, cores: SharedCores, tmp_path: Path
) -> None:
    engine = DecodeEngine(model, pool_config=KVPoolConfig(16 << 20, 16))
    async with running(engine, tmp_path, LONG) as outputs, asyncio.timeout(SOON_S):
        with cores.prefilling():
            reservation = admit(engine, spec("r1", len(PROMPT), GREEDY), PROMPT)
            await outputs.get()
            await asyncio.sleep(0.2)  # it rests
            engine.release(reservation)
            while engine.stats().pool.pages_used:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.02)


async def test_a_resting_thread_stops_at_once(
    engine: BusyEngine, cores: SharedCores, tmp_path: Path
) -> None:
    with cores.prefilling():
        async with running(engine, tmp_path, LONG):
            await steps_in(engine, 0.5)
            started_s = time.monotonic()
        assert time.monotonic() - started_s < SOON_S  # its rest would take longer
