"""What the tests of Compose share."""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.deploy.stack import COMPOSE, Stack


@pytest.fixture(scope="session")
def services() -> dict[str, Any]:
    """As Compose itself reads the file."""
    done = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE), "config"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout)["services"])


@pytest.fixture(scope="package")
def stack(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(services, tmp_path_factory.mktemp("compose"))
    try:
        stack.start_all()
        yield stack
    finally:
        stack.stop()
