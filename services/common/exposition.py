"""A process's /metrics endpoint: served on its own port and announced in the registry.

Prometheus discovers the ports through the gateway's /metrics/targets.
"""

import asyncio
import os
import socket
import uuid

from services.common.heartbeat import Heartbeat
from services.common.metrics import Metrics, MetricsServer, start_metrics_server
from services.common.registry import MetricsTarget, Record, Registry


def new_worker_id() -> str:
    """A globally unique ID for this process."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Exposition:
    """Serves and announces a process's metrics; `start` it once, then `stop` it."""

    def __init__(self, metrics: Metrics, model_name: str, registry: Registry) -> None:
        self._metrics = metrics
        self._model_name = model_name
        self._registry = registry
        self._server: MetricsServer | None = None
        self._heartbeat: Heartbeat | None = None

    async def start(self, host: str, port: int, advertised_host: str, lease_s: float) -> int:
        """Serve on `port` (0: any free one); returns the port.  Raises InvalidSetting if taken."""
        self._server = start_metrics_server(self._metrics.registry, port, host, share_port=True)
        target = MetricsTarget(
            new_worker_id(),
            f"{advertised_host}:{self._server.port}",
            self._metrics.role,
            self._model_name,
        )
        records: list[Record] = [target]
        self._heartbeat = Heartbeat(self._registry, lambda: records, lease_s)
        await self._heartbeat.start()
        return self._server.port

    async def stop(self) -> None:
        """Remove the announcement and close the port."""
        if self._heartbeat is not None:
            await self._heartbeat.stop()
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
