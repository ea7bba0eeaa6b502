import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import grpc
import pytest

from services.common.messages import sampling_to_proto
from services.common.redis_registry import RedisRegistry
from services.common.registry import WorkerRecord
from services.decode.worker import DecodeWorker
from tests.deadlines import SOON_S
from tests.services.decode.client import GREEDY, PROMPT, Client, error_of, token_ids_of
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPoolConfig
from winnow.errors import WinnowError
from winnow.models import load_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]

NAMESPACE = "decode-process-tests"
PROGRAM = """
import asyncio
from services.common.settings_sources import load_settings
from services.decode.main import run_decode
asyncio.run(run_decode(load_settings()))
"""
BREAKING = """
from winnow.engine.decode import DecodeEngine
def broken(self, step=DecodeEngine.step):
    if self.max_batch_size == 1:  # the proof that a model runs, when it is loaded
        return step(self)
    raise RuntimeError("device-side assert")
DecodeEngine.step = broken
"""


class RemoteWorker:
    """What the client needs to know of a worker in another process."""

    def __init__(self, record: WorkerRecord, model: Path) -> None:
        self.address, self.kv_address = record.address, record.kv_address
        self.engine = DecodeEngine(load_model(model), pool_config=KVPoolConfig(1 << 20, 16))


@asynccontextmanager
async def decode_process(
    model: Path, redis_url: str, before: str = ""
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    """A process that runs `before` and `run_decode`, found through the registry."""
    variables = {
        "WINNOW_MODEL": str(model),
        "WINNOW_REDIS_URL": redis_url,
        "WINNOW_NAMESPACE": NAMESPACE,
        "WINNOW_KV_MEMORY_BYTES": str(16 << 20),
        "WINNOW_NUM_THREADS": "1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", before + PROGRAM, env=os.environ | variables
    )
    registry = RedisRegistry(redis_url, NAMESPACE)
    try:
        async with asyncio.timeout(60):
            while not (records := await registry.workers()):
                assert process.returncode is None
                await asyncio.sleep(0.05)
        async with Client(cast(DecodeWorker, RemoteWorker(records[0], model))) as client:
            yield process, client
        assert await registry.workers() == []
    finally:
        await registry.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sigterm_lets_streams_finish_and_exits_with_0(
    tiny_models: dict[str, Path], redis_url: str
) -> None:
    async with decode_process(tiny_models["llama"], redis_url) as (process, client):
        call = await client.admit(client.request())
        process.send_signal(signal.SIGTERM)
        while not (await client.status()).draining:
            pass
        await client.push(client.frames())
        assert len(await token_ids_of(call)) == GREEDY.max_tokens
        async with asyncio.timeout(SOON_S):
            assert await process.wait() == 0


async def test_a_second_signal_cuts_the_drain_short(
    tiny_models: dict[str, Path], redis_url: str
) -> None:
    async with decode_process(tiny_models["llama"], redis_url) as (process, client):
        sampling = sampling_to_proto(replace(GREEDY, max_tokens=8000 - len(PROMPT)))
        call = await client.admit(client.request(sampling=sampling))
        process.send_signal(signal.SIGTERM)
        while not (await client.status()).draining:
            pass
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(SOON_S):
            assert (await error_of(call)).code in ("no_decode_worker", "cancelled")
            assert await process.wait() == 0


async def test_a_worker_whose_device_fails_ends_for_another_to_take_its_place(
    tiny_models: dict[str, Path], redis_url: str
) -> None:
    async with decode_process(tiny_models["llama"], redis_url, BREAKING) as (process, client):
        asked = 0
        while process.returncode is None:  # as a gateway that knows no better would go on asking
            asked += 1
            with contextlib.suppress(AssertionError, WinnowError, grpc.RpcError):
                call = await client.admit(client.request(f"r{asked}"))
                await client.push(client.frames(f"r{asked}"))
                await call.read()
                await error_of(call)
        assert process.returncode == 1
        assert asked >= 3
