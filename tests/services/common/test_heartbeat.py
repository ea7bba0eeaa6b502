"""A heartbeat keeps records alive while it runs, and ends when it is told to."""

import asyncio
import dataclasses
import time

from services.common.heartbeat import BEATS_PER_LEASE, Heartbeat
from services.common.registry import (
    AdapterRecord,
    LeasedRecords,
    MetricsTarget,
    Record,
    WorkerRecord,
)
from tests.deadlines import SOON_S

LEASE_S = 3.0
TARGET = MetricsTarget("worker-1", "10.0.0.1:9400", "decode", "tiny")


class SlowRegistry:
    """A registry in memory whose client swallows a cancellation, as Redis's does at times."""

    def __init__(self) -> None:
        self.records = LeasedRecords()
        self.num_puts = 0

    async def put(self, record: Record, lease_s: float) -> None:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
        self.num_puts += 1
        self.records.put(record, lease_s)

    async def remove(self, worker_id: str) -> None:
        self.records.remove(worker_id)

    async def workers(self) -> list[WorkerRecord]:
        return self.records.live(WorkerRecord)

    async def targets(self) -> list[MetricsTarget]:
        return self.records.live(MetricsTarget)

    async def adapters(self) -> list[AdapterRecord]:
        return self.records.live(AdapterRecord)

    async def close(self) -> None:
        pass


async def seconds_until_put(registry: SlowRegistry, num_puts: int) -> float:
    started_s = time.monotonic()
    async with asyncio.timeout(SOON_S):
        while registry.num_puts < num_puts:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
    return time.monotonic() - started_s


async def test_ends_in_the_middle_of_a_beat_and_takes_its_records_out() -> None:
    registry = SlowRegistry()
    heartbeat = Heartbeat(registry, lambda: [TARGET], lease_s=30)
    await heartbeat.start()
    assert await registry.targets() == [TARGET]
    heartbeat.hurry()
    await asyncio.sleep(0.005)  # the beat is under way
    async with asyncio.timeout(SOON_S):
        await heartbeat.stop()
    assert await registry.targets() == []


async def test_tells_news_at_once_and_renews_before_the_lease_ends() -> None:
    registry = SlowRegistry()
    records = [TARGET]
    heartbeat = Heartbeat(registry, lambda: records, lease_s=LEASE_S)
    await heartbeat.start()
    assert await seconds_until_put(registry, 2) < LEASE_S
    assert await registry.targets() == [TARGET]
    records[0] = dataclasses.replace(TARGET, address="10.0.0.1:9401")
    heartbeat.hurry()
    assert await seconds_until_put(registry, 3) < LEASE_S / BEATS_PER_LEASE
    assert await registry.targets() == records
    await heartbeat.stop()
    num_puts = registry.num_puts
    await asyncio.sleep(0.2)
    assert registry.num_puts == num_puts
