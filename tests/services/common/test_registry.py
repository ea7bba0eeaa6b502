"""Records of workers under a lease: in Redis, in a Ray actor, in memory."""

import asyncio
import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import redis
import uvloop
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.common.open_registry import open_registry
from services.common.ports import free_port
from services.common.ray_registry import RayRegistry, remove_ray_registry
from services.common.redis_registry import RedisRegistry
from services.common.registry import (
    AdapterRecord,
    LeasedRecords,
    MetricsTarget,
    Registry,
    WorkerRecord,
    record_from_json,
    record_to_json,
)
from services.common.settings import Settings
from tests.chaos.network import Network
from tests.deadlines import SOON_S
from winnow.errors import InvalidSetting, RegistryUnavailable

RECORD = WorkerRecord(
    worker_id="worker-1",
    address="10.0.0.1:5000",
    kv_address="10.0.0.1:5001",
    fingerprint="abc",
    model_name="tiny",
    wire_versions=(1, 2),
    pages_total=100,
    pages_free=40,
    running=3,
)


class RedisProcess:
    """A redis-server of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--save", "", "--dir", str(self.folder)], stdout=subprocess.DEVNULL
        )
        with redis.Redis(port=self.port) as client:
            deadline = time.monotonic() + SOON_S
            while not _answers(client):
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(params=["redis", "ray"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    opened: Registry
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        opened = RedisRegistry(server.url, f"test-{time.monotonic_ns()}")
    else:
        request.getfixturevalue("ray_cluster")
        opened = RayRegistry(f"test-{time.monotonic_ns()}")
    yield opened
    await opened.close()


TARGET = MetricsTarget("worker-1", "10.0.0.1:9400", "decode", "tiny")


async def until_gone(registry: Registry, worker_id: str) -> None:
    async with asyncio.timeout(SOON_S):
        while worker_id in [r.worker_id for r in await registry.workers()]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_returns_what_was_put(registry: Registry) -> None:
    await registry.put(RECORD, lease_s=30)
    assert await registry.workers() == [RECORD]


async def test_a_new_record_replaces_the_worker_s_old_one(registry: Registry) -> None:
    await registry.put(RECORD, lease_s=30)
    newer = dataclasses.replace(RECORD, pages_free=1, draining=True)
    await registry.put(newer, lease_s=30)
    assert await registry.workers() == [newer]


async def test_lists_workers_by_id(registry: Registry) -> None:
    other = dataclasses.replace(RECORD, worker_id="worker-0")
    await registry.put(RECORD, lease_s=30)
    await registry.put(other, lease_s=30)
    assert await registry.workers() == [other, RECORD]


async def test_forgets_a_removed_worker_and_minds_no_unknown_one(registry: Registry) -> None:
    await registry.put(RECORD, lease_s=30)
    await registry.remove(RECORD.worker_id)
    await registry.remove("nobody")
    assert await registry.workers() == []


async def test_keeps_workers_and_metrics_targets_apart(registry: Registry) -> None:
    await registry.put(RECORD, lease_s=30)
    await registry.put(TARGET, lease_s=30)
    assert (await registry.workers(), await registry.targets()) == ([RECORD], [TARGET])
    await registry.remove(RECORD.worker_id)
    assert (await registry.workers(), await registry.targets()) == ([], [])


async def test_an_adapter_is_no_process_and_outlives_one_of_its_name(registry: Registry) -> None:
    adapter = AdapterRecord(RECORD.worker_id, "abc", "/models/one", version=3, is_dropped=True)
    await registry.put(RECORD, lease_s=30)
    await registry.put(adapter, lease_s=30)
    await registry.remove(RECORD.worker_id)
    assert (await registry.workers(), await registry.adapters()) == ([], [adapter])


async def test_who_renews_an_older_version_of_an_adapter_takes_nothing_from_a_newer_one(
    registry: Registry,
) -> None:
    older = AdapterRecord("law", "abc", "/models/one", version=9)
    newer = AdapterRecord("law", "abc", "/models/one", version=10, is_dropped=True)
    for record in (older, newer, older):
        await registry.put(record, lease_s=30)
    assert await registry.adapters() == [newer]


async def test_a_record_is_gone_after_its_lease(registry: Registry) -> None:
    lasting = dataclasses.replace(RECORD, worker_id="lasting")
    await registry.put(lasting, lease_s=30)
    await registry.put(RECORD, lease_s=0.1)
    await until_gone(registry, RECORD.worker_id)
    assert await registry.workers() == [lasting]


async def test_services_of_other_namespaces_do_not_see_each_other(
    redis_server: RedisProcess,
) -> None:
    mine, theirs = RedisRegistry(redis_server.url, "mine"), RedisRegistry(redis_server.url, "other")
    await mine.put(RECORD, lease_s=30)
    assert await theirs.workers() == []
    await mine.close()
    await theirs.close()


async def test_a_record_that_cannot_be_read_is_left_out(redis_server: RedisProcess) -> None:
    registry = RedisRegistry(redis_server.url, "unreadable")
    await registry.put(RECORD, lease_s=30)
    with redis.Redis(port=redis_server.port) as client:
        client.set("unreadable:worker:broken", "{")
        client.set("unreadable:worker:short", "{}")
    assert await registry.workers() == [RECORD]
    await registry.close()


async def test_redis_that_is_away_is_reported_and_found_again(tmp_path: Path) -> None:
    server = RedisProcess(tmp_path)
    registry = RedisRegistry(server.url, "away")
    await registry.put(RECORD, lease_s=30)
    server.stop()
    with pytest.raises(RegistryUnavailable, match="Redis does not answer"):
        await registry.workers()
    server.start()
    await registry.put(RECORD, lease_s=30)
    assert await registry.workers() == [RECORD]
    await registry.close()
    server.stop()


async def test_a_removed_actor_is_started_again(ray_cluster: None) -> None:
    registry = RayRegistry("revived")
    await registry.put(RECORD, lease_s=30)
    remove_ray_registry("revived")
    async with asyncio.timeout(SOON_S):
        with pytest.raises(RegistryUnavailable):
            while True:  # Ray ends an actor some moments later
                await registry.workers()
        while await _known(registry) != [RECORD]:  # a heartbeat tries again too
            with contextlib.suppress(RegistryUnavailable):
                await registry.put(RECORD, lease_s=30)


async def _known(registry: Registry) -> list[WorkerRecord]:
    try:
        return await registry.workers()
    except RegistryUnavailable:
        return []


async def test_processes_of_one_cluster_share_the_records(ray_cluster: None) -> None:
    @ray.remote(num_cpus=0)
    def put_elsewhere() -> None:
        asyncio.run(RayRegistry("shared").put(RECORD, lease_s=30))

    registry = RayRegistry("shared")
    await asyncio.wait_for(put_elsewhere.remote(), 60)
    assert await registry.workers() == [RECORD]


async def test_the_actor_outlives_the_placement_group_of_a_worker_that_starts_it(
    ray_cluster: None,
) -> None:
    group = placement_group([{"CPU": 1}], strategy="STRICT_PACK")
    own = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)

    @ray.remote(num_cpus=1, scheduling_strategy=own)
    def put_from_a_group() -> None:
        asyncio.run(RayRegistry("grouped").put(RECORD, lease_s=30))

    await asyncio.wait_for(put_from_a_group.remote(), 60)
    remove_placement_group(group)
    assert await RayRegistry("grouped").workers() == [RECORD]


def test_lease_ends_exactly_when_it_ends() -> None:
    now_s = [0.0]
    records = LeasedRecords(clock_s=lambda: now_s[0])
    records.put(RECORD, lease_s=5)
    now_s[0] = 4.9
    assert records.live(WorkerRecord) == [RECORD]
    now_s[0] = 5.0
    assert records.live(WorkerRecord) == []


def test_reads_records_of_a_newer_version() -> None:
    newer = json.loads(record_to_json(RECORD)) | {"field_of_the_future": 1}
    assert record_from_json(WorkerRecord, json.dumps(newer)) == RECORD


async def test_redis_is_used_when_its_url_is_set(redis_server: RedisProcess) -> None:
    registry = open_registry(Settings(redis_url=redis_server.url))
    assert isinstance(registry, RedisRegistry)
    await registry.close()


def test_refuses_a_malformed_url_without_showing_it() -> None:
    with pytest.raises(InvalidSetting) as raised:
        open_registry(Settings(redis_url="http://:hunter2@h"))
    assert "redis_url" in raised.value.message
    assert "hunter2" not in raised.value.message


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_that_is_reset_is_a_registry_that_does_not_answer(
    redis_server: RedisProcess, run: Callable[[Coroutine[Any, Any, int]], int]
) -> None:
    async def num_failures(port: int) -> int:
        registry = RedisRegistry(f"redis://127.0.0.1:{port}/0", "resets")
        try:
            return sum(await asyncio.gather(*(_puts(registry, network) for _ in range(4))))
        finally:
            await registry.close()

    network = Network()
    try:
        assert run(num_failures(network.lead("redis", redis_server.port))) > 0
    finally:
        network.close()


async def _puts(registry: Registry, network: Network) -> int:
    """How many of some puts the registry did not answer, with resets in between."""
    num_failed = 0
    for _ in range(100):
        network.reset("redis")
        try:
            await registry.put(RECORD, lease_s=30)
        except RegistryUnavailable:
            num_failed += 1
        await asyncio.sleep(0.002)
    return num_failed
