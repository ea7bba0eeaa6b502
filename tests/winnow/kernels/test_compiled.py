"""What the kernels become for sm_80 and sm_90; no GPU is needed for that."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.compiled import Compiled, compile_launches
from winnow.kernels.gpu import attention

CAPABILITIES = (80, 90)
MAX_REGISTERS = 128  # four blocks of four warps fit onto a processor

pytestmark = pytest.mark.parametrize("capability", CAPABILITIES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


def compile_one_each(capability: int, launch: Callable[[], object]) -> dict[str, Compiled]:
    """The kernels by name; none of them spills or takes too many registers."""
    kernels = {kernel.kernel: kernel for kernel in compile_launches(capability, launch)}
    for kernel in kernels.values():
        assert kernel.spills == 0, kernel
        assert kernel.registers <= MAX_REGISTERS, kernel
    return kernels


@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "dtype"),
    [
        (64, 16, 16, torch.bfloat16),
        (96, 1, 32, torch.bfloat16),
        (128, 4, 16, torch.bfloat16),
        (128, 8, 64, torch.float16),
        (256, 2, 16, torch.bfloat16),
    ],
)
def test_attention_loads_pages_in_vectors(
    capability: int, head_dim: int, group: int, page_size: int, dtype: torch.dtype
) -> None:
    new = meta(8, 2, head_dim, dtype=dtype)
    pages = meta(99, page_size, head_dim, dtype=dtype)
    kernels = compile_one_each(
        capability,
        lambda: attention.append_and_attend(
            meta(8, 2 * group, head_dim, dtype=dtype),
            *(new, new, pages, pages),
            *(indices(8, 2), indices(8, 2, 64), indices(8, 2)),
            head_dim**-0.5,
        ),
    )
    attend = kernels["_attend"]
    tile_bytes = attention.block_size(head_dim) * head_dim * dtype.itemsize
    per_thread = tile_bytes // (32 * attention.NUM_WARPS * 16)
    # A block of keys and one of values, in the loop and in each stage filled before it.
    assert attend.vector_loads >= 2 * per_thread * (attention.NUM_STAGES - 1)
    assert attend.narrow_loads <= 2  # of the new key and value
    assert attend.shared_bytes <= 96 << 10
    assert kernels["_combine"].vector_loads > 0
