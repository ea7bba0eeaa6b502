"""The registry of workers in Redis."""

import logging
from pathlib import Path

from redis import RedisError
from redis.asyncio import Redis

from services.common.redis_access import malformed_url, redis_options
from services.common.registry import (
    KINDS,
    AdapterRecord,
    MetricsTarget,
    Record,
    RecordT,
    WorkerRecord,
    key_of,
    newest,
    record_from_json,
    record_to_json,
)
from winnow.errors import RegistryUnavailable

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_SCAN_BATCH = 1000
# uvloop raises RuntimeError on a write to a connection that the peer has just reset.
_BROKEN = (RedisError, RuntimeError)


class RedisRegistry:
    """One key per record, `<namespace>:<kind>:<its key>`, which expires with the lease."""

    def __init__(self, url: str, namespace: str, ca_file: Path | None = None) -> None:
        try:
            self._redis = Redis.from_url(url, **redis_options(ca_file, _TIMEOUT_S))
        except ValueError as error:
            raise malformed_url() from error
        self._namespace = namespace

    async def put(self, record: Record, lease_s: float) -> None:
        key, lease_ms = self._key(record.KIND, key_of(record)), max(1, round(lease_s * 1000))
        try:
            await self._redis.set(key, record_to_json(record), px=lease_ms)
        except _BROKEN as error:
            raise _unavailable(error) from error

    async def remove(self, worker_id: str) -> None:
        try:
            await self._redis.delete(*(self._key(kind, worker_id) for kind in KINDS))
        except _BROKEN as error:
            raise _unavailable(error) from error

    async def workers(self) -> list[WorkerRecord]:
        return await self._live(WorkerRecord)

    async def targets(self) -> list[MetricsTarget]:
        return await self._live(MetricsTarget)

    async def adapters(self) -> list[AdapterRecord]:
        return newest(await self._live(AdapterRecord))

    async def _live(self, cls: type[RecordT]) -> list[RecordT]:
        pattern = self._key(cls.KIND, "*")
        try:
            keys = [k async for k in self._redis.scan_iter(match=pattern, count=_SCAN_BATCH)]
            values = await self._redis.mget(sorted(set(keys))) if keys else []
        except _BROKEN as error:
            raise _unavailable(error) from error
        return [record for value in values if value and (record := _readable(cls, value))]

    def _key(self, kind: str, key: str) -> str:
        return f"{self._namespace}:{kind}:{key}"

    async def close(self) -> None:
        await self._redis.aclose()


def _readable(cls: type[RecordT], value: bytes | str) -> RecordT | None:
    try:
        return record_from_json(cls, value)
    except ValueError as error:
        logger.warning("a record in the registry is not readable and is left out: %s", error)
        return None


def _unavailable(error: Exception) -> RegistryUnavailable:
    return RegistryUnavailable(f"the registry in Redis does not answer: {error}")
