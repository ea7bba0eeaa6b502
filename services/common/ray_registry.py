"""The registry of workers in a small Ray actor, for a service without Redis."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from services.common.registry import (
    AdapterRecord,
    LeasedRecords,
    MetricsTarget,
    Record,
    WorkerRecord,
    newest,
)
from winnow.errors import InvalidSetting, RegistryUnavailable

_RAY_NAMESPACE = "winnow"
_TIMEOUT_S = 5.0
# Before its first answer: the actor is a process, and a busy machine takes its time to start one.
_START_TIMEOUT_S = 60.0
_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - compared, not bound


class _RecordsActor:
    """Holds the records. A restarted actor starts empty; heartbeats refill it."""

    def __init__(self) -> None:
        self._records = LeasedRecords()

    async def put(self, record: Record, lease_s: float) -> None:
        self._records.put(record, lease_s)

    async def remove(self, worker_id: str) -> None:
        self._records.remove(worker_id)

    async def workers(self) -> list[WorkerRecord]:
        return self._records.live(WorkerRecord)

    async def targets(self) -> list[MetricsTarget]:
        return self._records.live(MetricsTarget)

    async def adapters(self) -> list[AdapterRecord]:
        return newest(self._records.live(AdapterRecord))


class RayRegistry:
    """Calls the actor from any process of the Ray cluster, and starts it if it is missing."""

    def __init__(self, namespace: str) -> None:
        self._name = actor_name(namespace)
        self._actor = _find_or_start(self._name)
        self._has_answered = False
        self._lost = False

    async def put(self, record: Record, lease_s: float) -> None:
        await self._call(lambda actor: actor.put.remote(record, lease_s))

    async def remove(self, worker_id: str) -> None:
        await self._call(lambda actor: actor.remove.remote(worker_id))

    async def workers(self) -> list[WorkerRecord]:
        return list(await self._call(lambda actor: actor.workers.remote()))

    async def targets(self) -> list[MetricsTarget]:
        return list(await self._call(lambda actor: actor.targets.remote()))

    async def adapters(self) -> list[AdapterRecord]:
        return list(await self._call(lambda actor: actor.adapters.remote()))

    async def close(self) -> None:
        """Nothing to close: the actor lives on for other processes."""

    async def _call(self, method: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - the actor's result
        try:
            if self._lost:
                self._actor = await asyncio.to_thread(_find_or_start, self._name)
                self._lost = False
            timeout_s = _TIMEOUT_S if self._has_answered else _START_TIMEOUT_S
            result = await asyncio.wait_for(method(self._actor), timeout_s)
            self._has_answered = True
            return result
        except (RayError, TimeoutError, ValueError, AttributeError) as error:  # an older actor's
            self._lost = True
            raise RegistryUnavailable(f"the registry actor does not answer: {error!r}") from error


def _find_or_start(name: str) -> Any:  # noqa: ANN401 - an actor handle
    return (
        ray.remote(_RecordsActor)
        .options(
            name=name,
            namespace=_RAY_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy="DEFAULT",  # not in the placement group of a worker that starts it
        )
        .remote()
    )


def actor_name(namespace: str) -> str:
    return f"{namespace}-registry"


def open_ray_registry(namespace: str) -> RayRegistry:
    """The cluster's registry.  Raises InvalidSetting in a process outside any Ray cluster."""
    if not ray.is_initialized():
        raise InvalidSetting(
            "a worker outside of Ray needs a registry in Redis: set WINNOW_REDIS_URL",
            param="redis_url",
        )
    return RayRegistry(namespace)


def remove_ray_registry(namespace: str) -> None:
    """Stop the actor, if it was ever started."""
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    if actor_name(namespace) in names:
        ray.kill(ray.get_actor(actor_name(namespace), namespace=_RAY_NAMESPACE))


def reachable_host(host: str) -> str:
    """The address at which other machines of the cluster reach a process listening on `host`."""
    if host != _EVERY_ADDRESS:
        return host
    return str(ray.util.get_node_ip_address())
