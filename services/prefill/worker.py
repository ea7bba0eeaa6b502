"""A prefill worker hosted by Ray Serve: a queue, an engine thread, pushes to decode."""

import asyncio
from contextlib import AsyncExitStack

from ray import serve

from services.common.cores import open_shared_cores
from services.common.exposition import Exposition
from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.logs import configure_logging
from services.common.open_registry import open_registry
from services.common.ray_registry import reachable_host
from services.common.settings import Settings
from services.common.tls import PeerTls
from services.common.tracing import configure_tracing
from services.prefill.metrics import PrefillMetrics
from services.prefill.queue import PrefillQueue
from winnow.models import load_model


@serve.deployment
class Prefill:
    """One replica is one worker: one model, one engine thread."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._started = AsyncExitStack()
        configure_logging(settings.log_level, settings.log_format)
        configure_tracing(settings.otlp_endpoint, settings.trace_sample_ratio, "prefill")
        metrics = PrefillMetrics(settings.served_name)
        self._queue = PrefillQueue(
            load_model(
                settings.model,
                device=settings.device,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
            ),
            metrics,
            max_waiting=settings.max_waiting_prefills,
            max_open=settings.max_open_prefills,
            num_threads=settings.threads_per_worker(settings.prefill_replicas),
            peers=PeerTls.load(settings),
            cores=open_shared_cores(settings) if settings.prefill_crowds_decode else None,
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
        return await asyncio.wrap_future(self._queue.submit(job))

    async def ready(self) -> bool:
        """True if the engine can take a job."""
        return self._queue.alive

    async def check_health(self) -> None:
        """Called by Serve every few seconds, which replaces the replica if this raises."""
        if not self._queue.alive:
            raise RuntimeError("the prefill engine's thread has ended")

    async def __del__(self) -> None:
        """Awaited by Serve when it removes the replica, after its calls have ended.

        Also awaited after a failed start.
        """
        await self._started.aclose()
