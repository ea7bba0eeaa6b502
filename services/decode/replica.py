"""A decode worker hosted by Ray Serve, which places it and starts it again when it dies.

Requests do not come through Serve: gateway and prefill reach the worker's own gRPC ports, which
they find in the registry.
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
        """Serve asks every few seconds, and replaces the replica when this raises."""
        await self._worker.check()

    async def __del__(self) -> None:
        """Serve awaits this when the replica is to go, also after a start that failed."""
        await self._started.aclose()


def _reachable(settings: Settings) -> Settings:
    """Settings under which other machines find this one, if they are meant to."""
    if settings.decode_advertised_host is not None:
        return settings
    host = reachable_host(settings.decode_host)
    return settings.model_copy(update={"decode_advertised_host": host})
