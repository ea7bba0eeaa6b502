"""One service per test module, and a factory for services with other settings."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.services.gateway.service import TestService, running_service


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("redis") / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "ready to accept connections" in line.lower():
            break
    yield f"unix://{socket}"
    server.terminate()
    server.communicate()


@pytest.fixture(scope="session")
def model_path(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url) as service:
        yield service
        await service.until_idle()
