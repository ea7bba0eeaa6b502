"""A decode worker hosted by Ray Serve, which places it and restarts it when it dies.

Requests do not pass through Serve: gateway and prefill call the worker's own gRPC ports, which they
find in the registry.
"""

from contextlib import AsyncExitStack

from ray import serve

from services.common.logs import configure_logging
from services.common.ray_registry import reachable_host
from services.common.settings import Settings
from services.common.tracing import configure_tracing
from services.decode.worker import DecodeWorker


@serve.deployment
class Decode:
    """One replica is one worker."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._started = AsyncExitStack()
        configure_logging(settings.log_level, settings.log_format)
        configure_tracing(settings.otlp_endpoint, settings.trace_sample_ratio, "decode")
        self._worker = DecodeWorker(_reachable(settings))
        await self._worker.start()
        self._started.push_async_callback(self._worker.stop)
        self._started.push_async_callback(self._worker.drain, settings.drain_timeout_s)

    async def check_health(self) -> None:
        """Called by Serve every few seconds, which replaces the replica if this raises."""
        await self._worker.check()

    async def __del__(self) -> None:
        """Awaited by Serve when it removes the replica, also after a failed start."""
        await self._started.aclose()


def _reachable(settings: Settings) -> Settings:
    """Settings with an advertised host that other machines can reach, if none is set."""
    if settings.decode_advertised_host is not None:
        return settings
    host = reachable_host(settings.decode_host)
    return settings.model_copy(update={"decode_advertised_host": host})
