import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from services.common.redis_registry import RedisRegistry
from services.common.registry import WorkerRecord
from services.gateway.request.routing import Router
from tests.services.gateway.service import running_redis
from winnow.errors import RegistryUnavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECORD = WorkerRecord(
    worker_id="a",
    address="127.0.0.1:1",
    kv_address="127.0.0.1:2",
    fingerprint="f",
    model_name="m",
    wire_versions=(5,),
    pages_total=100,
    pages_free=50,
    running=0,
)


@pytest_asyncio.fixture(loop_scope="module")
async def registry(redis_url: str) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(redis_url, "routing")
    yield registry
    for record in await registry.workers():
        await registry.remove(record.worker_id)
    await registry.close()


@pytest.fixture
def read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.request.routing._REFRESH_S", 0)


async def order(router: Router) -> list[str]:
    return [worker.worker_id for worker in await router.candidates()]


async def test_prefers_the_worker_with_most_free_pages(registry: RedisRegistry) -> None:
    for worker_id, pages_free in (("a", 10), ("b", 30), ("c", 20)):
        await registry.put(replace(RECORD, worker_id=worker_id, pages_free=pages_free), 30)
    assert await order(Router(registry, "f")) == ["b", "c", "a"]


async def test_leaves_out_workers_that_cannot_take_the_prompt(registry: RedisRegistry) -> None:
    others = [
        replace(RECORD, worker_id="other-model", fingerprint="g"),
        replace(RECORD, worker_id="other-wire", wire_versions=(2, 7)),
        replace(RECORD, worker_id="draining", draining=True),
    ]
    for record in (RECORD, *others):
        await registry.put(record, 30)
    assert await order(Router(registry, "f")) == ["a"]


async def test_counts_its_own_requests_before_the_next_heartbeat(registry: RedisRegistry) -> None:
    other = replace(RECORD, worker_id="b", address="127.0.0.1:3", pages_free=45)
    await registry.put(RECORD, 30)
    await registry.put(other, 30)
    router = Router(registry, "f")
    place = router.enter(RECORD)
    place.count_pages(10)
    assert await order(router) == ["b", "a"]
    place.leave()
    assert await order(router) == ["a", "b"]
    await router.close()


async def test_an_unreachable_worker_comes_last(registry: RedisRegistry) -> None:
    await registry.put(RECORD, 30)
    await registry.put(replace(RECORD, worker_id="b", pages_free=1), 30)
    router = Router(registry, "f")
    place = router.enter(RECORD)
    place.suspect()
    place.leave()
    assert await order(router) == ["b", "a"]
    await router.close()


async def test_requests_at_once_read_the_registry_once(
    registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.request.routing._REFRESH_S", 60)
    await registry.put(RECORD, 30)
    router = Router(registry, "f")
    await router.candidates()
    await registry.remove("a")
    results = await asyncio.gather(*(order(router) for _ in range(10)))
    assert results == [["a"]] * 10


@pytest.mark.usefixtures("read_each_time")
async def test_a_worker_that_is_gone_is_forgotten(registry: RedisRegistry) -> None:
    await registry.put(RECORD, 30)
    router = Router(registry, "f")
    place = router.enter(RECORD)
    await registry.remove("a")
    assert await order(router) == []
    assert "a" in router._peers  # a request of ours still runs there
    place.leave()
    assert await order(router) == []
    assert "a" not in router._peers


@pytest.mark.usefixtures("read_each_time")
async def test_the_last_known_workers_serve_on_when_the_registry_is_gone(tmp_path: Path) -> None:
    with running_redis(tmp_path) as url:
        registry = RedisRegistry(url, "routing")
        await registry.put(RECORD, 30)
        router = Router(registry, "f")
        assert await order(router) == ["a"]
    assert await order(router) == ["a"]
    await registry.close()


@pytest.mark.usefixtures("read_each_time")
async def test_the_last_known_workers_serve_on_while_an_emptied_registry_fills_again(
    registry: RedisRegistry,
) -> None:
    await registry.put(RECORD, 30)
    patient, hasty = Router(registry, "f", refill_s=60), Router(registry, "f")
    assert await order(patient) == await order(hasty) == ["a"]
    await registry.remove("a")
    assert (await order(patient), await order(hasty)) == (["a"], [])
    await registry.put(replace(RECORD, worker_id="b"), 30)
    assert await order(patient) == ["b"]


@pytest.mark.usefixtures("read_each_time")
async def test_the_last_known_workers_serve_on_when_the_registry_comes_back_empty(
    tmp_path: Path,
) -> None:
    with running_redis(tmp_path) as url:
        registry = RedisRegistry(url, "routing")
        await registry.put(RECORD, 30)
        router = Router(registry, "f", refill_s=60)
        assert await order(router) == ["a"]
    assert await order(router) == ["a"]
    with running_redis(tmp_path):
        assert await order(router) == ["a"]
        await registry.close()


@pytest.mark.usefixtures("read_each_time")
async def test_an_emptied_registry_has_its_time_from_when_it_is_first_seen_empty(
    registry: RedisRegistry,
) -> None:
    await registry.put(RECORD, 30)
    router = Router(registry, "f", refill_s=1)
    assert await order(router) == ["a"]
    await asyncio.sleep(1.1)  # nobody asked meanwhile
    await registry.remove("a")
    assert await order(router) == ["a"]
    await asyncio.sleep(1.1)
    assert await order(router) == []


@pytest.mark.usefixtures("read_each_time")
async def test_the_last_worker_that_drains_and_leaves_gets_nothing_more(
    registry: RedisRegistry,
) -> None:
    router = Router(registry, "f", refill_s=60)
    await registry.put(replace(RECORD, draining=True), 30)
    assert await order(router) == []
    await registry.remove("a")
    assert await order(router) == []


async def test_a_registry_that_never_answered_is_unavailable(tmp_path: Path) -> None:
    registry = RedisRegistry(f"unix://{tmp_path}/none.sock", "routing")
    with pytest.raises(RegistryUnavailable):
        await Router(registry, "f").candidates()
    await registry.close()
