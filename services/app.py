"""The service as a Ray Serve application: gateway, prefill workers, decode workers.

`winnow serve` runs it on this machine. `serve deploy` runs it on a cluster, from the file that
`winnow serve --print-config` writes.
"""

import asyncio
import os
from contextlib import AsyncExitStack
from typing import Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from services.common.exposition import Exposition
from services.common.logs import configure_logging
from services.common.open_registry import open_registry
from services.common.openmp import SHORT_WAITS
from services.common.ray_registry import reachable_host
from services.common.settings import Settings
from services.common.tracing import configure_tracing
from services.decode.replica import Decode
from services.gateway.gateway import Gateway
from services.gateway.grpc.server import GrpcServer
from services.gateway.prefill.handle import HandlePrefiller
from services.gateway.prefill.router import PrefillRouter
from services.gateway.rest.admin import AdminServer
from services.gateway.rest.api import create_api
from services.prefill.worker import Prefill

Handle = DeploymentHandle[Any]

# Our own queues decide what waits and what is refused, so Serve's limit must never be reached.
_MAX_ONGOING = 10_000
_SHUTDOWN_MARGIN_S = 5.0
_PREFILL_ROUTER = f"{PrefillRouter.__module__}.{PrefillRouter.__name__}"
_ROUTING_STATS_PERIOD_S = 1.0

# One arena that keeps freed memory saves the next prompt its page faults (200,000 before).
_WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    **SHORT_WAITS,
}


@serve.deployment(name="Gateway")
@serve.ingress()
class GatewayReplica:
    """One gateway process: REST behind Serve's proxy, gRPC on its own port."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, prefill: Handle, decode: Handle | None
    ) -> None:
        """`decode` is unused: it binds the workers to the application; the registry finds them."""
        self._started = AsyncExitStack()
        configure_logging(settings.log_level, settings.log_format)
        configure_tracing(settings.otlp_endpoint, settings.trace_sample_ratio, "gateway")
        registry = await asyncio.to_thread(open_registry, settings)
        self._started.push_async_callback(registry.close)
        self._gateway = Gateway(settings, registry, HandlePrefiller(prefill))
        self._started.push_async_callback(self._gateway.close)
        exposition = Exposition(self._gateway.metrics, settings.served_name, registry)
        self._started.push_async_callback(exposition.stop)
        await exposition.start(
            settings.decode_host,
            settings.gateway_metrics_port,
            reachable_host(settings.decode_host),
            settings.lease_s,
        )
        if settings.admin_port is not None:
            admin = AdminServer(self._gateway)
            self._started.push_async_callback(admin.stop)
            await admin.start(settings.decode_host, settings.admin_port)
        if settings.grpc_port is not None:
            grpc_server = GrpcServer(self._gateway)
            self._started.push_async_callback(grpc_server.stop, settings.drain_timeout_s)
            await grpc_server.start(settings.host, settings.grpc_port)

    def __serve_build_asgi_app__(self) -> Any:  # noqa: ANN401 - Serve's signature
        return create_api(self._gateway)

    async def announce_end(self) -> str:
        """Set `Gateway.ending`; returns the replica ID."""
        self._gateway.ending = True
        return str(serve.get_replica_context().replica_id.unique_id)

    async def check_health(self) -> None:
        """Called by Serve every few seconds, which keeps the gauge of decode workers fresh."""
        await self._gateway.readiness()

    async def __del__(self) -> None:
        """Awaited by Serve when it removes the replica, after its requests have ended.

        Also awaited after a failed start.
        """
        await self._started.aclose()


def build_app(settings: Settings) -> serve.Application:
    """The application; Ray places its replicas where cores and GPUs are free."""
    prefill = (
        cast(serve.Deployment, Prefill)
        .options(
            num_replicas=settings.prefill_replicas,
            max_ongoing_requests=_MAX_ONGOING,
            **_worker_resources(
                settings,
                settings.prefill_num_cpus,
                settings.prefill_replicas,
                settings.prefill_ranks,
            ),
            **_prefill_routing(settings),
            **_shutdown(settings),
        )
        .bind(settings)
    )
    gateway = cast(serve.Deployment, GatewayReplica).options(
        num_replicas=settings.gateway_replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={
            "num_cpus": settings.gateway_num_cpus,
            "runtime_env": _environment("1"),
        },
        **_shutdown(settings),
    )
    return gateway.bind(settings, prefill, _decode(settings))


def _prefill_routing(settings: Settings) -> dict[str, Any]:
    """Nothing, which leaves it to Serve, unless there is a prefix store to choose."""
    holds_any = settings.prefix_cache_bytes > 0 and settings.prefill_replicas > 1
    if not (holds_any and settings.prefix_affinity):
        return {}
    router = {
        "request_router_class": _PREFILL_ROUTER,
        "request_routing_stats_period_s": _ROUTING_STATS_PERIOD_S,
    }
    return {"request_router_config": RequestRouterConfig.model_validate(router)}


def _decode(settings: Settings) -> serve.Application | None:
    if settings.decode_workers == 0:
        return None
    return (
        cast(serve.Deployment, Decode)
        .options(
            num_replicas=settings.decode_workers,
            **_worker_resources(
                settings,
                settings.decode_num_cpus,
                settings.decode_workers,
                settings.decode_ranks,
            ),
            **_shutdown(settings),
        )
        .bind(settings)
    )


def _worker_resources(
    settings: Settings, num_cpus: float, num_workers: int, num_ranks: int
) -> dict[str, Any]:
    """What Ray sets aside for a worker: for several ranks a placement group on one node.

    It is one bundle, because the ranks are processes of the worker's actor, and an actor sees the
    GPUs of its own bundle only.
    """
    threads = settings.threads_per_worker(num_workers * num_ranks)
    num_gpus = settings.gpus_per_worker(num_ranks)
    actor = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "runtime_env": _environment(str(threads), **_WORKER_ENVIRONMENT),
    }
    bundle = {name: count for name, count in (("CPU", num_cpus), ("GPU", num_gpus)) if count}
    if num_ranks == 1 or not bundle:
        return {"ray_actor_options": actor}
    return {
        "ray_actor_options": actor,
        "placement_group_bundles": [bundle],
        "placement_group_strategy": "STRICT_PACK",
    }


def _environment(num_threads: str, **variables: str) -> dict[str, Any]:
    """A replica's runtime environment: it imports from the same folders as this process."""
    imports = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return {"env_vars": {"OMP_NUM_THREADS": num_threads, **imports, **variables}}


def _shutdown(settings: Settings) -> dict[str, Any]:
    return {
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + _SHUTDOWN_MARGIN_S,
    }
