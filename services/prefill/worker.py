"""A prefill worker as Ray Serve hosts it: a queue, an engine thread, pushes to decode."""

import asyncio
import logging

from ray import serve

from services.common.logs import configure_logging
from services.common.metrics import PrefillMetrics, start_metrics_server
from services.common.settings import Settings
from services.prefill.queue import PrefillQueue
from winnow.models import load_model
from winnow.request import PrefillJob, PrefillOutcome

logger = logging.getLogger(__name__)


@serve.deployment
class Prefill:
    """One replica is one worker: one model, one engine thread."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log_level, settings.log_format)
        metrics = PrefillMetrics()
        self._queue = PrefillQueue(
            load_model(settings.model, device=settings.device, dtype=settings.dtype),
            metrics,
            max_waiting=settings.max_waiting_prefills,
            num_threads=settings.threads_per_worker(settings.prefill_replicas),
        )
        self._queue.start()
        self._metrics_server = start_metrics_server(metrics.registry, 0, settings.host)
        logger.info("prefill worker's metrics are on port %d", self._metrics_server.port)

    async def prefill(self, job: PrefillJob) -> PrefillOutcome:
        """Computes the job's KV and pushes it; cancelling the call stops at the next layer.

        Raises WinnowError, as services.gateway.prefiller.Prefiller says.
        """
        return await asyncio.wrap_future(self._queue.submit(job))

    async def ready(self) -> bool:
        """True if the engine can take a job."""
        return self._queue.alive

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces the replica when this raises."""
        if not self._queue.alive:
            raise RuntimeError("the prefill engine's thread has ended")

    async def __del__(self) -> None:
        """Serve awaits this when the replica is to go, after the calls it was given have ended."""
        await asyncio.to_thread(self._queue.stop)
        await asyncio.to_thread(self._metrics_server.close)
