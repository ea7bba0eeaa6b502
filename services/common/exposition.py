"""A process's /metrics: served on a port of its own, and announced in the registry.

Prometheus finds the ports through the gateway's /metrics/targets.
"""

import asyncio
import os
import socket
import uuid

from services.common.heartbeat import Heartbeat
from services.common.metrics import Metrics, MetricsServer, start_metrics_server
from services.common.registry import MetricsTarget, Record, Registry


def new_worker_id() -> str:
    """An id of this process that no other has, here or elsewhere."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Exposition:
    """Start it once, stop it."""

    def __init__(self, metrics: Metrics, model_name: str, registry: Registry) -> None:
        self._metrics = metrics
        self._model_name = model_name
        self._registry = registry
        self._server: MetricsServer | None = None
        self._heartbeat: Heartbeat | None = None

    async def start(self, host: str, port: int, advertised_host: str, lease_s: float) -> int:
        """The port that is served; 0 asks for any.  Raises InvalidSetting if it is taken."""
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
        """Takes the announcement back and closes the port."""
        if self._heartbeat is not None:
            await self._heartbeat.stop()
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
