"""A decode worker: model, engine thread, gRPC servers and heartbeat, with one start and stop."""

import asyncio
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TypeVar

import torch

from services.common.cores import open_shared_cores
from services.common.exposition import new_worker_id
from services.common.heartbeat import Heartbeat
from services.common.metrics import start_metrics_server
from services.common.open_registry import open_registry
from services.common.registry import FEATURES, MetricsTarget, Record, WorkerRecord
from services.common.settings import Settings
from services.common.tls import PeerTls
from services.decode.admission import Admission
from services.decode.control_server import ControlServer
from services.decode.engine_thread import EngineThread
from services.decode.generate import GenerateServicer, WorkerIdentity
from services.decode.give_away import KvGiver
from services.decode.kv_server import KvServer
from services.decode.metrics import DecodeMetrics
from services.decode.push import KvReceiver
from services.decode.take_over import Fetcher
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPoolConfig
from winnow.models import load_model
from winnow.sampler_version import SAMPLER_VERSION
from winnow.wire import WIRE_VERSIONS

logger = logging.getLogger(__name__)

_EVERY_ADDRESS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - compared, not bound
_MAX_SIGN_OF_LIFE_S = 5.0  # a gateway's lease may be shorter than this worker's
_T = TypeVar("_T")


class DecodeWorker:
    """Start it once, drain it, stop it; `stop` ends all its threads, servers and tasks."""

    def __init__(self, settings: Settings) -> None:
        self.worker_id = new_worker_id()
        self.metrics = DecodeMetrics(settings.served_name)
        self.address = ""  # advertised host:port of Decode, once started
        self.kv_address = ""
        self.metrics_port = 0
        self._settings = settings
        self._started = AsyncExitStack()

    async def start(self) -> None:
        """Return when requests are served and the worker is registered.

        Raises UnusableModel or InvalidSetting; nothing is left running then.
        """
        async with AsyncExitStack() as started:
            await self._start(started)
            self._started = started.pop_all()
        logger.info("decode worker %s serves on %s", self.worker_id, self.address)

    async def drain(self, timeout_s: float) -> int:
        """Admit nothing more, migrate running requests, and wait for those that cannot move.

        Returns the number of requests left when it ended or timed out.
        """
        self.admission.draining = True
        self.metrics.draining.set(1)
        await self._control.announce_draining()
        self._heartbeat.hurry()
        self.admission.send_away()
        return await self.admission.wait_until_idle(timeout_s)

    async def stop(self) -> None:
        """End what still runs and release every thread, socket and page."""
        await self._started.aclose()

    async def wait_until_broken(self) -> None:
        """Return when the worker can no longer serve."""
        await self._engine_thread.wait_until_ended()

    async def check(self) -> None:
        """Raise RuntimeError if the worker can no longer serve."""
        if not self._engine_thread.alive:
            raise RuntimeError("the decode engine's thread has ended")

    async def _start(self, started: AsyncExitStack) -> None:
        settings = self._settings
        host = settings.decode_host
        peers = PeerTls.load(settings)
        registry = await _in_thread(lambda: open_registry(settings))
        started.push_async_callback(registry.close)
        self.engine = await _in_thread(self._load_engine)
        self.admission = Admission(self.engine)
        self._engine_thread = EngineThread(
            self.engine,
            self.metrics,
            self.admission.deliver,
            self.admission.fail_all,
            cores=open_shared_cores(settings),
            num_cores=settings.decode_share * settings.threads_per_worker(settings.decode_workers),
        )
        self._engine_thread.start()
        started.push_async_callback(self._engine_thread.stop)

        receiver = self._start_data_plane(started, peers)
        fetcher = Fetcher(self.engine.model, self.metrics, peers)
        started.push_async_callback(_in_thread, fetcher.stop)

        identity = WorkerIdentity(
            self.worker_id,
            self.kv_address,
            settings.kv_lease_s,
            min(settings.lease_s / 3, _MAX_SIGN_OF_LIFE_S),
        )
        self._control = ControlServer(
            GenerateServicer(
                identity,
                self.engine,
                self.admission,
                self.metrics,
                fetcher,
                self.drain,
                lambda: receiver.open_transfers,
                settings.drain_timeout_s,
            ),
            peers,
        )
        started.push_async_callback(self._control.stop)
        port = await self._control.start(host, settings.decode_port)
        self.address = f"{_advertised_host(settings)}:{settings.decode_advertised_port or port}"

        metrics_server = start_metrics_server(self.metrics.registry, settings.metrics_port, host)
        started.push_async_callback(_in_thread, metrics_server.close)
        self.metrics_port = metrics_server.port
        self._heartbeat = Heartbeat(registry, self._records, settings.lease_s)
        started.push_async_callback(self._heartbeat.stop)
        await self._heartbeat.start()

    def _start_data_plane(self, started: AsyncExitStack, peers: PeerTls | None) -> KvReceiver:
        """Start KvTransfer, which receives prefill's KV and sends running requests away."""
        settings, model = self._settings, self.engine.model
        receiver = KvReceiver(self.admission, self.metrics, model.fingerprint, model.shape)
        giver = KvGiver(self.admission, self.metrics, model.fingerprint, self.engine.pool)
        server = KvServer(receiver, giver, peers)
        started.push_async_callback(_in_thread, server.stop)
        self.metrics.transfers_in_flight.set_function(lambda: receiver.open_transfers)
        port = server.start(settings.decode_host, settings.kv_port)
        advertised = _advertised_host(settings)
        self.kv_address = f"{advertised}:{settings.kv_advertised_port or port}"
        return receiver

    def _load_engine(self) -> DecodeEngine:
        settings = self._settings
        torch.set_num_threads(settings.threads_per_worker(settings.decode_workers))
        model = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
        )
        engine = DecodeEngine(
            model,
            pool_config=KVPoolConfig(
                settings.kv_memory_bytes, settings.page_size, settings.kv_overcommit
            ),
            max_batch_size=settings.max_batch_size,
            swap_bytes=settings.swap_bytes,
        )
        self._observe(engine)
        return engine

    def _observe(self, engine: DecodeEngine) -> None:
        """Let gauges read the engine at scrape time, so that they are never stale."""
        metrics = self.metrics
        metrics.pages_total.set_function(lambda: engine.stats().pool.pages_total)
        metrics.pages_used.set_function(lambda: engine.stats().pool.pages_used)
        metrics.kv_used_ratio.set_function(lambda: engine.stats().pool.used_ratio)
        metrics.pages_reserved.set_function(lambda: engine.stats().pool.pages_reserved)
        metrics.pages_free.set_function(lambda: engine.stats().pool.pages_free)
        metrics.kv_bytes.set_function(lambda: engine.stats().pool.kv_bytes_used)
        metrics.kv_unpruned_bytes.set_function(lambda: engine.stats().kv_unpruned_bytes)
        metrics.swapped_sequences.set_function(lambda: engine.stats().swapped_sequences)
        metrics.swapped_bytes.set_function(lambda: engine.stats().swapped_bytes)
        metrics.running_sequences.set_function(lambda: engine.stats().running_sequences)
        metrics.waiting_requests.set_function(lambda: engine.stats().reserved_requests)
        metrics.device_memory_bytes.set_function(lambda: engine.model.memory_bytes)

    def _records(self) -> list[Record]:
        return [self._record(), self._metrics_target()]

    def _metrics_target(self) -> MetricsTarget:
        address = f"{_advertised_host(self._settings)}:{self.metrics_port}"
        return MetricsTarget(self.worker_id, address, "decode", self._settings.served_name)

    def _record(self) -> WorkerRecord:
        stats = self.engine.stats()
        return WorkerRecord(
            worker_id=self.worker_id,
            address=self.address,
            kv_address=self.kv_address,
            fingerprint=self.engine.model.fingerprint,
            model_name=self._settings.served_name,
            wire_versions=WIRE_VERSIONS,
            pages_total=stats.pool.pages_total,
            pages_free=stats.pool.pages_free,
            running=stats.running_sequences + stats.reserved_requests,
            draining=self.admission.draining,
            features=FEATURES,
            sampler_version=SAMPLER_VERSION,
        )


def _advertised_host(settings: Settings) -> str:
    """The host at which other processes reach this worker."""
    if settings.decode_advertised_host is not None:
        return settings.decode_advertised_host
    if settings.decode_host in _EVERY_ADDRESS:
        return socket.gethostname()
    return settings.decode_host


async def _in_thread(blocking: Callable[[], _T]) -> _T:
    """Run `blocking` in a temporary thread (asyncio's own executor threads would linger)."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, blocking)
