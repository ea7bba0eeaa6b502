"""One stack of real processes for all cases; each case leaves it whole."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.victim import LEASE_S, Victim
from tests.deploy.conftest import services  # noqa: F401 - a fixture
from tests.deploy.stack import Stack


@pytest.fixture(scope="package")
def victim(
    services: dict[str, Any],  # noqa: F811 - the fixture
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Victim]:
    """The Compose services, with a short lease."""
    stack = Stack(
        services, tmp_path_factory.mktemp("chaos"), WINNOW_LEASE_S=str(LEASE_S), OMP_NUM_THREADS="1"
    )
    try:
        stack.start_all()
        yield Victim(stack)
    finally:
        stack.stop()


@pytest.fixture(autouse=True)
def nothing_is_left(victim: Victim) -> Iterator[None]:
    """After each case every process runs, and holds nothing."""
    yield
    victim.restore()
    victim.require_idle()
