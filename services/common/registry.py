"""Who decodes where: records of the live decode workers, each under a lease.

A worker puts its record again before the lease ends; a record whose lease ran out is gone. With
`redis_url` set the records live in Redis, otherwise in a small Ray actor (ray_registry.py).
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from redis import RedisError
from redis.asyncio import Redis

from services.common.settings import Settings
from winnow.errors import InvalidSetting, RegistryUnavailable

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_SCAN_BATCH = 1000


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a decode worker says of itself.

    address, kv_address: host:port of Decode and of KvTransfer. model_name is for people; models
    are compared by fingerprint. running: sequences in the batch and requests that wait for KV.
    """

    worker_id: str
    address: str
    kv_address: str
    fingerprint: str
    model_name: str
    wire_versions: tuple[int, ...]
    pages_total: int
    pages_free: int
    running: int
    draining: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "WorkerRecord":
        """Reads what `to_json` wrote, here or in a newer version that knows more fields.

        Raises ValueError for anything else.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = {k: v for k, v in json.loads(text).items() if k in known}
            return cls(**(values | {"wire_versions": tuple(values["wire_versions"])}))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a worker record: {error!r}") from error


class Registry(Protocol):
    """Every method raises RegistryUnavailable when the registry does not answer."""

    async def put(self, record: WorkerRecord, lease_s: float) -> None:
        """Store or renew a record for the next `lease_s` seconds."""

    async def remove(self, worker_id: str) -> None:
        """Forget a worker; one that is not there is fine."""

    async def workers(self) -> list[WorkerRecord]:
        """Records whose lease has not run out, by worker_id."""

    async def close(self) -> None:
        """Drop the connection; the records stay."""


class LeasedRecords:
    """Records in this process's memory, forgotten when their lease ends."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._leases: dict[str, tuple[float, WorkerRecord]] = {}

    def put(self, record: WorkerRecord, lease_s: float) -> None:
        self._leases[record.worker_id] = (self._clock_s() + lease_s, record)

    def remove(self, worker_id: str) -> None:
        self._leases.pop(worker_id, None)

    def live(self) -> list[WorkerRecord]:
        now = self._clock_s()
        self._leases = {k: lease for k, lease in self._leases.items() if lease[0] > now}
        return [self._leases[worker_id][1] for worker_id in sorted(self._leases)]


class RedisRegistry:
    """One key per worker, `<namespace>:worker:<worker_id>`, which Redis expires with the lease."""

    def __init__(self, url: str, namespace: str) -> None:
        try:
            self._redis = Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
        except ValueError as error:
            raise InvalidSetting(
                "setting redis_url: it must be like redis://host:6379/0", param="redis_url"
            ) from error
        self._prefix = f"{namespace}:worker:"

    async def put(self, record: WorkerRecord, lease_s: float) -> None:
        key, lease_ms = self._prefix + record.worker_id, max(1, round(lease_s * 1000))
        try:
            await self._redis.set(key, record.to_json(), px=lease_ms)
        except RedisError as error:
            raise _unavailable(error) from error

    async def remove(self, worker_id: str) -> None:
        try:
            await self._redis.delete(self._prefix + worker_id)
        except RedisError as error:
            raise _unavailable(error) from error

    async def workers(self) -> list[WorkerRecord]:
        pattern = self._prefix + "*"
        try:
            keys = [k async for k in self._redis.scan_iter(match=pattern, count=_SCAN_BATCH)]
            values = await self._redis.mget(sorted(set(keys))) if keys else []
        except RedisError as error:
            raise _unavailable(error) from error
        return [record for value in values if value and (record := _readable(value))]

    async def close(self) -> None:
        await self._redis.aclose()


def _readable(value: bytes | str) -> WorkerRecord | None:
    try:
        return WorkerRecord.from_json(value)
    except ValueError as error:
        logger.warning("a record in the registry is not readable and is left out: %s", error)
        return None


def _unavailable(error: RedisError) -> RegistryUnavailable:
    return RegistryUnavailable(f"the registry in Redis does not answer: {error}")


def open_registry(settings: Settings) -> Registry:
    """The registry that the settings name.

    Raises InvalidSetting if that is Ray's, and this process is not part of a Ray cluster.
    """
    if settings.redis_url is not None:
        return RedisRegistry(settings.redis_url.get_secret_value(), settings.namespace)
    from services.common.ray_registry import open_ray_registry  # noqa: PLC0415 - Ray loads slowly

    return open_ray_registry(settings.namespace)
