"""One service for all examples that need one."""

from collections.abc import Iterator

import pytest

from tests.e2e.winnow_process import FREE_PORTS, WinnowServe


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WinnowServe]:
    """`winnow serve` on the embedded model, ready."""
    service = WinnowServe(
        tmp_path_factory.mktemp("serve"), [*FREE_PORTS, "--kv-memory-bytes", "256MiB"]
    )
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.kill()
