import asyncio
import threading
from pathlib import Path

from services.decode.engine_thread import EngineThread
from services.decode.metrics import DecodeMetrics
from tests.services.decode.client import GREEDY, PROMPT
from tests.winnow.drive import admit, spec
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPoolConfig
from winnow.engine.outputs import StepOutput
from winnow.errors import EngineFailed, WinnowError
from winnow.models import load_model


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
