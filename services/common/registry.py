"""Who decodes where, and who serves metrics: records of live processes, each under a lease.

A process puts its records again before the lease ends; a record whose lease ran out is gone. With
`redis_url` set the records live in Redis, otherwise in a small Ray actor (ray_registry.py).
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from redis import RedisError
from redis.asyncio import Redis

from services.common.redis_access import malformed_url, redis_options, require_redis
from services.common.settings import Settings
from winnow.errors import RegistryUnavailable

logger = logging.getLogger(__name__)

# What decode workers of this release carry out, and older ones would ignore.
MIN_TOKENS = "min_tokens"
FEATURES = (MIN_TOKENS,)

_TIMEOUT_S = 2.0
_SCAN_BATCH = 1000
# RuntimeError is uvloop's word for writing to a connection that the other end has just reset.
_BROKEN = (RedisError, RuntimeError)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a decode worker says of itself.

    address, kv_address: host:port of Decode and of KvTransfer. model_name is for people; models
    are compared by fingerprint. running: sequences in the batch and requests that wait for KV.
    features: of FEATURES, and of what newer releases know.
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
    features: tuple[str, ...] = ()

    KIND: ClassVar = "worker"


@dataclass(frozen=True, slots=True)
class MetricsTarget:
    """Where a process of any role serves /metrics. address: host:port."""

    worker_id: str
    address: str
    role: str
    model_name: str

    KIND: ClassVar = "metrics"


Record = WorkerRecord | MetricsTarget
_KINDS = (WorkerRecord.KIND, MetricsTarget.KIND)
_R = TypeVar("_R", WorkerRecord, MetricsTarget)


def record_to_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))


def record_from_json(cls: type[_R], text: str | bytes) -> _R:
    """Reads what `record_to_json` wrote, here or in a newer version that knows more fields.

    Raises ValueError for anything else.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    try:
        values = {k: _frozen(v) for k, v in json.loads(text).items() if k in known}
        return cls(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a {cls.KIND} record: {error!r}") from error


def _frozen(value: Any) -> Any:  # noqa: ANN401 - what JSON can hold
    return tuple(value) if isinstance(value, list) else value


class Registry(Protocol):
    """Every method raises RegistryUnavailable when the registry does not answer."""

    async def put(self, record: Record, lease_s: float) -> None:
        """Store or renew a record for the next `lease_s` seconds."""

    async def remove(self, worker_id: str) -> None:
        """Forget all records of a process; one that is not there is fine."""

    async def workers(self) -> list[WorkerRecord]:
        """Decode workers whose lease has not run out, by worker_id."""

    async def targets(self) -> list[MetricsTarget]:
        """Processes with metrics whose lease has not run out, by worker_id."""

    async def close(self) -> None:
        """Drop the connection; the records stay."""


class LeasedRecords:
    """Records in this process's memory, forgotten when their lease ends."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._leases: dict[tuple[str, str], tuple[float, Record]] = {}

    def put(self, record: Record, lease_s: float) -> None:
        self._leases[record.KIND, record.worker_id] = (self._clock_s() + lease_s, record)

    def remove(self, worker_id: str) -> None:
        for kind in _KINDS:
            self._leases.pop((kind, worker_id), None)

    def live(self, cls: type[_R]) -> list[_R]:
        """Records of one class, by worker_id."""
        now = self._clock_s()
        self._leases = {k: lease for k, lease in self._leases.items() if lease[0] > now}
        records = [self._leases[key][1] for key in sorted(self._leases)]
        return [record for record in records if isinstance(record, cls)]


class RedisRegistry:
    """One key per record, `<namespace>:<kind>:<worker_id>`, which Redis expires with the lease."""

    def __init__(self, url: str, namespace: str, ca_file: Path | None = None) -> None:
        try:
            self._redis = Redis.from_url(url, **redis_options(ca_file, _TIMEOUT_S))
        except ValueError as error:
            raise malformed_url() from error
        self._namespace = namespace

    async def put(self, record: Record, lease_s: float) -> None:
        key, lease_ms = self._key(record.KIND, record.worker_id), max(1, round(lease_s * 1000))
        try:
            await self._redis.set(key, record_to_json(record), px=lease_ms)
        except _BROKEN as error:
            raise _unavailable(error) from error

    async def remove(self, worker_id: str) -> None:
        try:
            await self._redis.delete(*(self._key(kind, worker_id) for kind in _KINDS))
        except _BROKEN as error:
            raise _unavailable(error) from error

    async def workers(self) -> list[WorkerRecord]:
        return await self._live(WorkerRecord)

    async def targets(self) -> list[MetricsTarget]:
        return await self._live(MetricsTarget)

    async def _live(self, cls: type[_R]) -> list[_R]:
        pattern = self._key(cls.KIND, "*")
        try:
            keys = [k async for k in self._redis.scan_iter(match=pattern, count=_SCAN_BATCH)]
            values = await self._redis.mget(sorted(set(keys))) if keys else []
        except _BROKEN as error:
            raise _unavailable(error) from error
        return [record for value in values if value and (record := _readable(cls, value))]

    def _key(self, kind: str, worker_id: str) -> str:
        return f"{self._namespace}:{kind}:{worker_id}"

    async def close(self) -> None:
        await self._redis.aclose()


def _readable(cls: type[_R], value: bytes | str) -> _R | None:
    try:
        return record_from_json(cls, value)
    except ValueError as error:
        logger.warning("a record in the registry is not readable and is left out: %s", error)
        return None


def _unavailable(error: Exception) -> RegistryUnavailable:
    return RegistryUnavailable(f"the registry in Redis does not answer: {error}")


def open_registry(settings: Settings) -> Registry:
    """The registry that the settings name.

    Raises InvalidSetting if that is a Redis that does not let this process in, or Ray's, and this
    process is not part of a Ray cluster.
    """
    if settings.redis_url is not None:
        require_redis(settings)
        url = settings.redis_url.get_secret_value()
        return RedisRegistry(url, settings.namespace, settings.redis_ca_file)
    from services.common.ray_registry import open_ray_registry  # noqa: PLC0415 - Ray loads slowly

    return open_ray_registry(settings.namespace)
