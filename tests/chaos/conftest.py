"""One stack of real processes for all cases; each case leaves it whole."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.victim import Victim, running_victim
from tests.deploy.conftest import services  # noqa: F401 - a fixture


@pytest.fixture(scope="package")
def victim(
    services: dict[str, Any],  # noqa: F811 - the fixture
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Victim]:
    with running_victim(services, tmp_path_factory.mktemp("chaos")) as victim:
        yield victim


@pytest.fixture(autouse=True)
def nothing_is_left(victim: Victim) -> Iterator[None]:
    """After each case every process runs, and holds nothing."""
    yield
    victim.restore()
    victim.require_idle()
    victim.require_as_before()
