"""A whole service in the test's process: uvicorn, gRPC, prefill queue, decode workers, Redis."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import AsyncOpenAI

from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.redis_registry import RedisRegistry
from services.common.settings import Settings
from services.common.tls import PeerTls
from services.decode.worker import DecodeWorker
from services.gateway.gateway import Gateway
from services.gateway.grpc.server import GrpcServer
from services.gateway.rest.admin import AdminServer
from services.gateway.rest.api import create_api
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from tests.deadlines import SOON_S
from tests.redis_process import start_redis, stop_redis
from winnow.decoder import DecoderModel
from winnow.distributed.ranks import Ranks
from winnow.engine.prefix.store import PrefixStore
from winnow.models import load_model

MODEL_NAME = "tiny"
_numbers = itertools.count()  # of services; each has a namespace of its own


class QueuePrefiller:
    """Prefill in this process; what a Ray handle is in the service.

    `failures` are raised, one per job, before any job is done; `hold` makes jobs wait; `asked`
    and `cancelled` tell of the latest job.
    """

    def __init__(self, queue: PrefillQueue) -> None:
        self.queue = queue
        self.jobs: list[PrefillJob] = []
        self.failures: list[Exception] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def prefill(self, job: PrefillJob) -> PrefillOutcome:
        self.jobs.append(job)
        self.asked.set()
        try:
            await self.hold.wait()
            if self.failures:
                raise self.failures.pop(0)
            return await asyncio.wrap_future(self.queue.submit(job))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def hold_jobs(self) -> None:
        """From now on jobs wait until `hold` is set."""
        for event in (self.hold, self.asked, self.cancelled):
            event.clear()

    async def ready(self) -> bool:
        return self.queue.alive


@dataclass
class TestService:
    """Everything of one service that a test may look at."""

    __test__ = False

    settings: Settings
    gateway: Gateway
    prefiller: QueuePrefiller
    registry: RedisRegistry
    workers: list[DecodeWorker]
    url: str
    grpc_address: str
    openai: AsyncOpenAI
    http: httpx.AsyncClient
    admin: httpx.AsyncClient

    async def until_idle(self, timeout_s: float = SOON_S) -> None:
        """Returns when prefill and decode hold nothing any more."""
        async with asyncio.timeout(timeout_s):
            for worker in self.workers:
                await worker.admission.wait_until_idle(timeout_s)
                while worker.engine.stats().pool.pages_reserved:
                    await self.http.get("/health")
        for worker in self.workers:
            stats = worker.engine.stats()
            assert (stats.pool.pages_used, stats.running_sequences) == (0, 0)


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """A Redis of one's own, by its URL."""
    socket_path = folder / "redis.sock"
    server = start_redis("--port", "0", "--unixsocket", str(socket_path))
    try:
        yield f"unix://{socket_path}"
    finally:
        stop_redis(server)


@asynccontextmanager
async def running_service(
    model: Path,
    redis_url: str,
    *,
    num_workers: int = 1,
    prefill_model: Any = None,
    prefill_ranks: Any = None,
    **changes: object,
) -> AsyncIterator[TestService]:
    """A service on free ports; `changes` are settings.

    prefill_model: in place of `model`'s.  prefill_ranks: as for PrefillQueue.
    """
    settings = _settings(model, redis_url, changes)
    async with AsyncExitStack() as running:
        workers = [await _start_worker(running, settings) for _ in range(num_workers)]
        registry = RedisRegistry(redis_url, settings.namespace)
        running.push_async_callback(registry.close)
        prefiller = _start_prefill(running, settings, prefill_model, prefill_ranks)
        gateway = Gateway(settings, registry, prefiller)
        running.push_async_callback(gateway.close)
        grpc_server = GrpcServer(gateway)
        running.push_async_callback(grpc_server.stop)
        grpc_port = await grpc_server.start("127.0.0.1", 0)
        url = await _start_http(running, gateway)
        admin_url = await _start_admin(running, gateway)
        http = await running.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60))
        admin = await running.enter_async_context(httpx.AsyncClient(base_url=admin_url, timeout=60))
        openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        running.push_async_callback(openai.close)
        yield TestService(
            settings,
            gateway,
            prefiller,
            registry,
            workers,
            url,
            f"127.0.0.1:{grpc_port}",
            openai,
            http,
            admin,
        )


def _settings(model: Path, redis_url: str, changes: dict[str, Any]) -> Settings:
    values: dict[str, Any] = {
        "model": str(model),
        "model_name": MODEL_NAME,
        "redis_url": redis_url,
        "namespace": f"gateway-{next(_numbers)}",
        "num_threads": 1,
        "kv_memory_bytes": 32 << 20,
        "pruning": {"method": "full", "window_size": 8},
    }
    return Settings(**(values | changes))


async def _start_worker(running: AsyncExitStack, settings: Settings) -> DecodeWorker:
    worker = DecodeWorker(settings)
    await worker.start()
    running.push_async_callback(worker.stop)
    return worker


def _start_prefill(
    running: AsyncExitStack,
    settings: Settings,
    model: DecoderModel | None,
    ranks: Ranks | None,
) -> QueuePrefiller:
    model = model or load_model(
        settings.model,
        max_model_len=settings.max_model_len,
        adapter_room=settings.adapter_room(),
    )
    queue = PrefillQueue(
        model,
        PrefillMetrics("tiny"),
        max_waiting=settings.max_waiting_prefills,
        max_open=settings.max_open_prefills,
        num_threads=1,
        store=PrefixStore.within(
            model,
            settings.prefix_cache_bytes,
            settings.prefix_cache_device,
            settings.kv_dtype,
        ),
        kv_dtype=settings.kv_dtype,
        peers=PeerTls.load(settings),
        ranks=ranks,
    )
    queue.start()
    running.push_async_callback(asyncio.to_thread, queue.stop)
    return QueuePrefiller(queue)


async def _start_admin(running: AsyncExitStack, gateway: Gateway) -> str:
    server = AdminServer(gateway)
    running.push_async_callback(server.stop)
    return f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"


async def _start_http(running: AsyncExitStack, gateway: Gateway) -> str:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_api(gateway), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))

    async def stop() -> None:
        server.should_exit = True
        await serving
        listener.close()

    running.push_async_callback(stop)
    return f"http://127.0.0.1:{listener.getsockname()[1]}"
