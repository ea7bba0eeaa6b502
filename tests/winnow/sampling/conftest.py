"""These tests are of PyTorch's operations; tests/winnow/kernels/cpu has those of the kernel."""

from collections.abc import Iterator

import pytest

from winnow.kernels.cpu import masses


@pytest.fixture(scope="package", autouse=True)
def _without_kernel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masses, "can_sum", lambda _: False)
        yield
