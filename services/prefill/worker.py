"""A prefill worker hosted by Ray Serve: a queue, an engine thread, pushes to decode."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from ray import serve

from services.common.cores import open_shared_cores
from services.common.exposition import Exposition
from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.logs import configure_logging
from services.common.open_registry import open_registry
from services.common.ranks import load_worker_model
from services.common.ray_registry import reachable_host
from services.common.settings import Settings
from services.common.tls import PeerTls
from services.common.tracing import configure_tracing
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from services.prefill.rank import EXTENSION
from winnow.distributed.split_decoder import SplitDecoder
from winnow.engine.prefix.store import PrefixStore


@serve.deployment
class Prefill:
    """One replica is one worker: one model, one engine thread."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._started = AsyncExitStack()
        configure_logging(settings.log_level, settings.log_format)
        configure_tracing(settings.otlp_endpoint, settings.trace_sample_ratio, "prefill")
        metrics = PrefillMetrics(settings.served_name)
        num_threads = settings.threads_per_worker(
            settings.prefill_replicas * settings.prefill_ranks
        )
        model, ranks = load_worker_model(settings, settings.prefill_ranks, num_threads, EXTENSION)
        if ranks is not None:
            self._started.push_async_callback(asyncio.to_thread, ranks.close)
            model = SplitDecoder(model, ranks)
        self._queue = PrefillQueue(
            model,
            metrics,
            max_waiting=settings.max_waiting_prefills,
            max_open=settings.max_open_prefills,
            num_threads=num_threads,
            store=PrefixStore.within(
                model,
                settings.prefix_cache_bytes,
                settings.prefix_cache_device,
                settings.kv_dtype,
                prefix_cache_device_bytes=settings.prefix_cache_device_bytes,
            ),
            kv_dtype=settings.kv_dtype,
            peers=PeerTls.load(settings),
            cores=open_shared_cores(settings) if settings.prefill_crowds_decode else None,
            ranks=ranks,
        )
        self._queue.start()
        self._started.push_async_callback(asyncio.to_thread, self._queue.stop)
        registry = await asyncio.to_thread(open_registry, settings)
        self._started.push_async_callback(registry.close)
        exposition = Exposition(metrics, settings.served_name, registry)
        self._started.push_async_callback(exposition.stop)
        await exposition.start(
            settings.decode_host,
            settings.prefill_metrics_port,
            reachable_host(settings.decode_host),
            settings.lease_s,
        )

    async def prefill(self, job: PrefillJob) -> PrefillOutcome:
        """Compute the job's KV and push it; cancelling the call stops it at the next layer.

        Raises WinnowError, as described in services.gateway.request.prefiller.Prefiller.
        """
        if job.adapter is not None:
            await asyncio.to_thread(self._queue.warm, job.adapter)
        return await asyncio.wrap_future(self._queue.submit(job))

    async def ready(self) -> bool:
        """True if the engine can take a job."""
        return self._queue.alive

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve regularly; what it returns reaches the routers of all gateways."""
        stats = self._queue.routing_stats()
        return {} if stats is None else stats.to_dict()

    async def check_health(self) -> None:
        """Called by Serve every few seconds, which replaces the replica if this raises."""
        if not self._queue.alive:
            raise RuntimeError("the prefill engine's thread has ended")

    async def __del__(self) -> None:
        """Awaited by Serve when it removes the replica, after its calls have ended.

        Also awaited after a failed start.
        """
        await self._started.aclose()
