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
from services.common.ranks import load_worker_model
from services.common.registry import (
    ADAPTERS,
    FEATURES,
    GRAMMAR,
    MetricsTarget,
    Record,
    WorkerRecord,
)
from services.common.settings import Settings
from services.common.tls import PeerTls
from services.decode.admission import Admission
from services.decode.control_server import ControlServer
from services.decode.engine_thread import EngineThread
from services.decode.fetch import KvSender
from services.decode.generate import GenerateServicer, WorkerIdentity
from services.decode.grammars import load_grammar_compiler
from services.decode.kv_server import KvServer
from services.decode.metrics import DecodeMetrics
from services.decode.parts import RankedParts
from services.decode.push import KvReceiver
from services.decode.rank import EXTENSION, ServeKv, ServingKv
from services.decode.take_over import Fetcher
from winnow.decoder import DecoderModel
from winnow.distributed.commands import Extend
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_pool import SplitPool
from winnow.engine.decode import DecodeEngine
from winnow.engine.graph import recorder_for
from winnow.engine.kv_pool import KVPoolConfig
from winnow.errors import InvalidSetting
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
        self.rank_kv_addresses: tuple[str, ...] = ()  # where each rank receives its heads' KV
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
        peers = PeerTls.load(settings)
        registry = await _in_thread(lambda: open_registry(settings))
        started.push_async_callback(registry.close)
        await self._start_engine(started)
        receiver = self._start_data_plane(started, peers)
        await self._start_control(started, peers, receiver)
        metrics_server = start_metrics_server(
            self.metrics.registry, settings.metrics_port, settings.decode_host
        )
        started.push_async_callback(_in_thread, metrics_server.close)
        self.metrics_port = metrics_server.port
        self._heartbeat = Heartbeat(registry, self._records, settings.lease_s)
        started.push_async_callback(self._heartbeat.stop)
        await self._heartbeat.start()

    async def _start_engine(self, started: AsyncExitStack) -> None:
        """Load the model, and start the engine's thread."""
        settings = self._settings
        model, ranks = await _in_thread(self._load_model)
        if ranks is not None:
            started.push_async_callback(_in_thread, ranks.close)
        self.engine = await _in_thread(lambda: self._make_engine(model, ranks))
        started.push_async_callback(_in_thread, self.engine.close)
        self._grammars = await _in_thread(lambda: load_grammar_compiler(model.description))
        if self._grammars is not None:
            started.push_async_callback(_in_thread, self._grammars.close)
        self.admission = Admission(self.engine)
        self._engine_thread = EngineThread(
            self.engine,
            self.metrics,
            self.admission.deliver,
            self.admission.fail_all,
            cores=open_shared_cores(settings),
            num_cores=settings.decode_share * self._num_threads,
        )
        self._engine_thread.start()
        started.push_async_callback(self._engine_thread.stop)

    async def _start_control(
        self, started: AsyncExitStack, peers: PeerTls | None, receiver: KvReceiver
    ) -> None:
        """Start Decode, which answers gateways."""
        settings = self._settings
        fetcher = Fetcher(self.engine.model, self.metrics, peers)
        started.push_async_callback(_in_thread, fetcher.stop)
        identity = WorkerIdentity(
            self.worker_id,
            self.kv_address,
            settings.kv_lease_s,
            min(settings.lease_s / 3, _MAX_SIGN_OF_LIFE_S),
            self.rank_kv_addresses,
        )
        servicer = GenerateServicer(
            identity,
            self.engine,
            self.admission,
            self.metrics,
            fetcher,
            self.drain,
            lambda: receiver.open_transfers,
            settings.drain_timeout_s,
            self._grammars,
        )
        self._control = ControlServer(servicer, peers)
        started.push_async_callback(self._control.stop)
        port = await self._control.start(settings.decode_host, settings.decode_port)
        self.address = f"{_advertised_host(settings)}:{settings.decode_advertised_port or port}"

    def _start_data_plane(self, started: AsyncExitStack, peers: PeerTls | None) -> KvReceiver:
        """Start KvTransfer, which receives prefill's KV and sends running requests away."""
        settings, model = self._settings, self.engine.model
        pool = self.engine.pool
        parts = RankedParts(pool) if isinstance(pool, SplitPool) else None
        receiver = KvReceiver(self.admission, self.metrics, model.description, model.device, parts)
        sender = KvSender(self.admission, self.metrics, model.description, pool)
        server = KvServer(receiver, sender, peers, of_several_ranks=parts is not None)
        started.push_async_callback(_in_thread, server.stop)
        self.metrics.transfers_in_flight.set_function(lambda: receiver.open_transfers)
        port = server.start(settings.decode_host, settings.kv_port)
        advertised = _advertised_host(settings)
        self.kv_address = f"{advertised}:{settings.kv_advertised_port or port}"
        if isinstance(pool, SplitPool) and settings.kv_advertised_port is None:
            self.rank_kv_addresses = self._serve_on_ranks(pool.ranks, peers)
        return receiver

    def _serve_on_ranks(self, ranks: Ranks, peers: PeerTls | None) -> tuple[str, ...]:
        """Have the other ranks receive the KV of their heads; returns every rank's address.

        Behind NAT theirs is not known.  Raises InvalidSetting if a port is taken.
        """
        settings, advertised = self._settings, _advertised_host(self._settings)
        ranks.listen(lambda rank, news: self.engine.note_failure())  # of a PlacingFailed
        first = settings.kv_port
        serve = [
            Extend(ServeKv(settings.decode_host, first and first + rank, peers))
            for rank in range(1, ranks.num_ranks)
        ]
        served = ranks.ask_each(serve, ServingKv)
        for rank, one in enumerate(served, start=1):
            if one.refusal is not None:
                raise InvalidSetting(f"rank {rank}: {one.refusal}", param="kv_port")
        return (self.kv_address, *(f"{advertised}:{one.port}" for one in served))

    @property
    def _num_threads(self) -> int:
        """Threads of each rank."""
        settings = self._settings
        return settings.threads_per_worker(settings.decode_workers * settings.decode_ranks)

    def _load_model(self) -> tuple[DecoderModel, Ranks | None]:
        torch.set_num_threads(self._num_threads)
        return load_worker_model(
            self._settings,
            self._settings.decode_ranks,
            self._num_threads,
            EXTENSION,
        )

    def _make_engine(self, model: DecoderModel, ranks: Ranks | None) -> DecodeEngine:
        settings = self._settings
        engine = DecodeEngine(
            model,
            pool_config=KVPoolConfig(
                settings.kv_memory_bytes,
                settings.page_size,
                settings.kv_overcommit,
                settings.kv_dtype,
            ),
            max_batch_size=settings.max_batch_size,
            swap_bytes=settings.swap_bytes,
            ranks=ranks,
            new_recorder=recorder_for(model.device, settings.cuda_graphs),
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
        metrics.state_bytes.set_function(lambda: engine.pool.states.nbytes)
        metrics.kv_unpruned_bytes.set_function(lambda: engine.stats().kv_unpruned_bytes)
        metrics.swapped_sequences.set_function(lambda: engine.stats().swapped_sequences)
        metrics.swapped_bytes.set_function(lambda: engine.stats().swapped_bytes)
        metrics.running_sequences.set_function(lambda: engine.stats().running_sequences)
        metrics.waiting_requests.set_function(lambda: engine.stats().reserved_requests)
        metrics.device_memory_bytes.set_function(lambda: engine.model.memory_bytes)
        metrics.adapters_loaded.set_function(lambda: engine.model.num_adapters)

    def _records(self) -> list[Record]:
        return [self._record(), self._metrics_target()]

    def _metrics_target(self) -> MetricsTarget:
        address = f"{_advertised_host(self._settings)}:{self.metrics_port}"
        return MetricsTarget(self.worker_id, address, "decode", self._settings.served_name)

    def _features(self) -> tuple[str, ...]:
        """FEATURES, and those that this worker may have."""
        own = ((GRAMMAR, self._grammars), (ADAPTERS, self.engine.model.adapters))
        return (*FEATURES, *(name for name, part in own if part is not None))

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
            features=self._features(),
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
