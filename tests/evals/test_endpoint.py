"""`winnow eval --endpoint` against a whole service."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from evals.rest_client import RestClient
from services.cli.main import main
from services.gateway.access.keys import entry_text, new_key
from tests.evals.run_records import outcomes, records_in
from tests.services.conftest import redis_url  # noqa: F401 - a fixture
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import InvalidSetting

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED = (
    *("eval", "--tasks", "passkey,niah", "--length", "768", "--budget", "64", "--samples", "2"),
    *("--methods", "full,asl:threshold=0.9,snapkv", "--num-threads", "1"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    tiny_models: dict[str, Path],
    redis_url: str,  # noqa: F811 - the fixture
) -> AsyncIterator[TestService]:
    pruning = {"kernel_size": 3}
    async with running_service(tiny_models["llama"], redis_url, pruning=pruning) as service:
        yield service
        await service.until_idle()


async def run(*flags: str) -> int:
    return await asyncio.to_thread(main, [*ASKED, *flags])


@pytest.mark.parametrize("chat", [(), ("--chat",)])
async def test_a_service_gives_the_records_of_a_model_in_this_process(
    service: TestService, tiny_models: dict[str, Path], tmp_path: Path, chat: tuple[str, ...]
) -> None:
    local = ("--model", str(tiny_models["llama"]), "--pruning", "kernel_size=3")
    assert await run("-o", str(tmp_path / "local"), *local, *chat) == 0
    assert await run("-o", str(tmp_path / "served"), "--endpoint", service.url, *chat) == 0
    served = records_in(tmp_path / "served")
    assert len(served) == 2 * 2 * 3
    assert outcomes(served) == outcomes(records_in(tmp_path / "local"))
    assert all(record.prefill_s < record.seconds for record in served)
    assert (tmp_path / "served" / "rho.png").exists()


async def test_a_busy_service_is_asked_again(
    tiny_models: dict[str, Path],
    redis_url: str,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    memory = {"kv_memory_bytes": 1_300_000, "kv_overcommit": 1}
    async with running_service(tiny_models["llama"], redis_url, **memory) as small:
        small.prefiller.hold_jobs()  # until one was refused
        flags = ("--endpoint", f"{small.url}/v1", "--batch-size", "6", "-o", str(tmp_path / "run"))
        running = asyncio.create_task(run(*flags))
        refused = 0.0
        while not refused:
            metrics = (await small.admin.get("/metrics")).text
            refused = value(metrics, "winnow_requests_refused_total", reason="overloaded")
        small.prefiller.hold.set()
        assert await running == 0
    assert len(records_in(tmp_path / "run")) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "gpt-7"), f"does not serve 'gpt-7'; it serves {MODEL_NAME}"),
        (("--budget", "16"), "select_tokens is 16; it must be above window_size, 32"),
        (("--methods", "fastkv:fixed_layer=9"), "fixed_layer is 9"),
        (("--length", "16k"), "--length 16,384: the model has 8,192 positions"),
    ],
)
async def test_what_the_service_refuses_is_said_before_anything_is_written(
    service: TestService,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert await run("--endpoint", service.url, "-o", str(tmp_path / "run"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


async def test_what_does_not_fit_the_service_is_said_before_anything_is_written(
    tiny_models: dict[str, Path],
    redis_url: str,  # noqa: F811 - the fixture
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running_service(tiny_models["llama"], redis_url, kv_memory_bytes=300_000) as small:
        assert await run("--endpoint", small.url, "-o", str(tmp_path / "run")) == 2
    assert "KV pages" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


async def test_a_service_with_keys_is_asked_with_one(
    tiny_models: dict[str, Path],
    redis_url: str,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    key, entry = new_key("evals")
    keys_file = tmp_path / "keys.yaml"
    keys_file.write_text(entry_text(entry))
    async with running_service(tiny_models["llama"], redis_url, api_keys_file=keys_file) as closed:
        with RestClient(closed.url, 1, key) as client:
            card = await asyncio.to_thread(client.model_card, None)
        assert card["id"] == MODEL_NAME
        with RestClient(closed.url, 1) as stranger, pytest.raises(InvalidSetting, match="API key"):
            await asyncio.to_thread(stranger.model_card, None)
