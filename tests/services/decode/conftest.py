"""A decode worker on a tiny model, registered in a real Redis, and a client that speaks to it.

One worker serves all tests of a module; after each test it must hold nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest_asyncio

from services.common.redis_registry import RedisRegistry
from services.common.settings import Settings
from services.decode.worker import DecodeWorker
from tests.deadlines import SOON_S
from tests.services.decode.client import Client

StartWorker = Callable[..., Awaitable[DecodeWorker]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def registry(redis_url: str) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(redis_url, "decode-tests")
    yield registry
    await registry.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_worker(tiny_models: dict[str, Path], redis_url: str) -> AsyncIterator[StartWorker]:
    """Starts workers; stops them when the module's tests have ended."""
    workers = []

    async def start(**changes: object) -> DecodeWorker:
        values = {
            "model": str(tiny_models["llama"]),
            "redis_url": redis_url,
            "namespace": "decode-tests",
            "num_threads": 1,
            "kv_memory_bytes": 16 << 20,
        }
        worker = DecodeWorker(Settings(**(values | changes)))
        await worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        await worker.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(start_worker: StartWorker) -> DecodeWorker:
    return await start_worker()


@pytest_asyncio.fixture(loop_scope="module")
async def client(worker: DecodeWorker) -> AsyncIterator[Client]:
    async with Client(worker) as client:
        yield client
        async with asyncio.timeout(SOON_S):
            await client.until_idle()
