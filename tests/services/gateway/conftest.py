"""One service per test module, and a factory for services with other settings."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.services.gateway.service import TestService, running_service


@pytest.fixture(scope="session")
def model_path(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url) as service:
        yield service
        await service.until_idle()


@pytest_asyncio.fixture(loop_scope="module")
async def several(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    """A service of three decode workers, which a test may lose."""
    async with running_service(model_path, redis_url, num_workers=3) as service:
        yield service
