"""Gateways agree on the adapters that are served, through the registry."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.common.redis_registry import RedisRegistry
from services.common.settings import Settings
from services.gateway import served_adapters
from services.gateway.metrics import MAX_ADAPTER_LABELS, GatewayMetrics
from services.gateway.served_adapters import ServedAdapters
from tests.deadlines import SOON_S
from tests.winnow.adapters.made import save_adapter
from winnow.errors import InvalidSetting, UnknownModel
from winnow.model_files import describe_model


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_adapters, "SYNC_S", 0.05)


@asynccontextmanager
async def gateway(
    model: Path, redis_url: str, namespace: str, lease_s: float = 30, **adapters: Path
) -> AsyncIterator[ServedAdapters]:
    settings = Settings(
        model=str(model), adapters=adapters, max_adapters=2, lease_s=lease_s, gateway_replicas=2
    )
    registry = RedisRegistry(redis_url, namespace)
    served = ServedAdapters(settings, describe_model(model), registry)
    yield served
    await served.close()
    await registry.close()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_what_one_loads_and_drops_all_serve_and_refuse(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    own, more = (save_adapter(tmp_path / name, model_path, targets=("q_proj",)) for name in "ab")
    async with (
        gateway(model_path, redis_url, "agree", own=own) as one,
        gateway(model_path, redis_url, "agree", own=own) as other,
    ):
        assert one.names == other.names == ("own",)
        await one.add(await one.describe("more", str(more)))
        await until(lambda: other.find("more") == one.find("more"))
        await other.drop("more")
        await other.drop("own")
        await until(lambda: one.names == ())
        with pytest.raises(UnknownModel, match="adapter 'own' is not served here"):
            await one.drop("own")
        await one.add(await one.describe("own", str(more)))
        await until(lambda: other.names == ("own",))
        async with gateway(model_path, redis_url, "agree", own=own) as later:
            await until(lambda: later.find("own") == one.find("own"))


async def test_a_clock_that_is_set_back_delays_no_change(
    model_path: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tmp_path / "a", model_path, targets=("q_proj",))
    async with (
        gateway(model_path, redis_url, "back") as one,
        gateway(model_path, redis_url, "back") as other,
    ):
        await one.add(await one.describe("more", str(folder)))
        await until(lambda: other.names == ("more",))
        monkeypatch.setattr("time.time_ns", lambda: 1)
        await other.drop("more")
        assert other.names == ()
        await until(lambda: one.names == ())


async def test_names_stay_as_long_as_a_gateway_runs(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "a", model_path, targets=("q_proj",))
    async with gateway(model_path, redis_url, "stay", lease_s=0.3) as one:
        await one.add(await one.describe("more", str(folder)))
        await asyncio.sleep(0.6)
        async with gateway(model_path, redis_url, "stay", lease_s=0.3) as other:
            await until(lambda: other.names == ("more",))


async def test_counts_names_up_to_a_limit(
    model_path: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = GatewayMetrics("tiny")
    labels = [metrics.adapter_label(f"adapter-{idx}") for idx in range(MAX_ADAPTER_LABELS + 2)]
    assert labels[-3:] == [f"adapter-{MAX_ADAPTER_LABELS - 1}", "other", "other"]
    assert metrics.adapter_label("adapter-0") == "adapter-0"
    monkeypatch.setattr(served_adapters, "MAX_NAMES", 1)
    folder = save_adapter(tmp_path / "a", model_path, targets=("q_proj",))
    async with gateway(model_path, redis_url, "many", own=folder) as one:
        with pytest.raises(InvalidSetting, match="1 adapters are known; the limit is 1"):
            await one.describe("more", str(folder))
