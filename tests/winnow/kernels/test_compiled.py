"""What the kernels become for sm_80 and sm_90; no GPU is needed for that."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.compiled import Compiled, compile_launches
from winnow.kernels.gpu import activation, attention, norm, recompression, rope, scatter
from winnow.kernels.rope import HeadNorms, RingSlots

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


@pytest.mark.parametrize("size", [896, 8192])
def test_norms_load_and_store_vectors(capability: int, size: int) -> None:
    tokens, weight = meta(8, size), meta(size)
    kernels = compile_one_each(capability, lambda: norm.add_rms_norm(tokens, tokens, weight, 1e-5))
    kernel = kernels["_rms_norm"]
    assert kernel.vector_loads >= 3  # hidden, residual, weight
    assert kernel.vector_stores >= 2
    assert kernel.narrow_loads == 0


def test_silu_mul_loads_and_stores_vectors(capability: int) -> None:
    kernels = compile_one_each(capability, lambda: activation.silu_mul(meta(8, 2 * 4864)))
    kernel = kernels["_silu_mul"]
    assert (kernel.vector_loads, kernel.vector_stores, kernel.narrow_loads) == (2, 1, 0)


@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_rotation_loads_and_stores_vectors(capability: int, head_dim: int) -> None:
    norms = HeadNorms(meta(head_dim), meta(head_dim), 1e-6)
    ring = RingSlots(meta(999, head_dim), indices(8, 32))
    table = meta(8, head_dim)
    kernels = compile_one_each(
        capability, lambda: rope.rotate(meta(8, 48, head_dim), table, table, 32, 8, norms, ring)
    )
    kernel = kernels["_rotate"]
    assert kernel.vector_loads >= 2
    assert kernel.vector_stores >= 4  # each half, in place and in the ring
    assert kernel.narrow_loads <= 6  # of the tables and norms, which all heads share


@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_scattering_loads_and_stores_vectors(capability: int, head_dim: int) -> None:
    entries = (meta(999, head_dim), meta(999, head_dim), meta(999, dtype=torch.int32))
    kernels = compile_one_each(capability, lambda: scatter.scatter(entries, indices(999), entries))
    kernel = kernels["_scatter"]
    per_thread = 32 * head_dim * 2 // (128 * 16)
    assert kernel.vector_loads >= 2 * per_thread
    assert kernel.vector_stores >= 2 * per_thread
    assert kernel.narrow_loads == 0


@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_recompression_loads_pages_in_vectors(capability: int, head_dim: int) -> None:
    pages, table, lengths = meta(99, 16, head_dim), indices(64, 150), indices(64)

    def recompress() -> None:
        queries = meta(64, 4, 32, head_dim)
        recompression.window_scores(queries, pages, table, lengths, 0.125)
        pool = (pages, meta(99, 16, head_dim), meta(99, 16, dtype=torch.int32))
        recompression.compact(pool, table, indices(64, 2048), lengths)

    kernels = compile_one_each(capability, recompress)
    assert list(kernels) == ["_normalisers", "_shares", "_compact"]
    for kernel in kernels.values():
        assert kernel.vector_loads >= 4
        assert kernel.narrow_loads == 0
    assert kernels["_compact"].vector_stores >= 8
