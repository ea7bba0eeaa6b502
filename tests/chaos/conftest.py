"""One stack of real processes for all cases; each case leaves it whole."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.linked_stack import LinkedStack
from tests.chaos.victim import KV_LEASE_S, LEASE_S, REQUEST_TIMEOUT_S, Victim
from tests.deploy.conftest import services  # noqa: F401 - a fixture


@pytest.fixture(scope="package")
def victim(
    services: dict[str, Any],  # noqa: F811 - the fixture
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Victim]:
    """The Compose services, with short leases."""
    stack = LinkedStack(
        services,
        tmp_path_factory.mktemp("chaos"),
        WINNOW_LEASE_S=str(LEASE_S),
        WINNOW_KV_LEASE_S=str(KV_LEASE_S),
        WINNOW_REQUEST_TIMEOUT_S=str(REQUEST_TIMEOUT_S),
        OMP_NUM_THREADS="1",
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
    victim.require_as_before()
