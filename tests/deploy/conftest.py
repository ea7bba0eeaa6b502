"""What the tests of Compose share."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.stack import Stack, compose_services


@pytest.fixture(scope="session")
def services() -> dict[str, Any]:
    """As Compose itself reads the file."""
    return compose_services()


@pytest.fixture(scope="package")
def stack(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(services, tmp_path_factory.mktemp("compose"))
    try:
        stack.start_all()
        yield stack
    finally:
        stack.stop()
