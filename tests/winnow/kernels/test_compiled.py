"""What the kernels become for sm_80 and sm_90; no GPU is needed for that."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton import knobs

from tests.winnow.kernels.compiled import Compiled, compile_launches
from winnow.kernels.gpu import activation, attention, norm, recompression, rope, scatter
from winnow.kernels.rope import HeadNorms
from winnow.kernels.variant import PLAIN, Variant

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


def table_of(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots, pages, rows and lengths of 8 rows with 2 heads each."""
    return indices(8, 2), indices(8, 2, width), indices(8), meta(8, 2, dtype=torch.int32)


def compile_one_each(
    capability: int, launch: Callable[[], object], max_registers: int = MAX_REGISTERS
) -> dict[str, Compiled]:
    """The kernels by name; none of them spills or takes too many registers."""
    kernels = {kernel.kernel: kernel for kernel in compile_launches(capability, launch)}
    for kernel in kernels.values():
        assert kernel.spills == 0, kernel
        assert kernel.registers <= max_registers, kernel
    return kernels


SLIDING = Variant(indices(8), meta(99, 16, dtype=torch.int32))


@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "dtype", "variant"),
    [
        (64, 16, 16, torch.bfloat16, PLAIN),
        (96, 1, 32, torch.bfloat16, PLAIN),
        (128, 4, 16, torch.bfloat16, PLAIN),
        (128, 8, 64, torch.float16, PLAIN),
        (256, 2, 16, torch.bfloat16, PLAIN),
        (256, 4, 16, torch.bfloat16, SLIDING),
        (256, 2, 16, torch.bfloat16, replace(SLIDING, softcap=50.0)),
        (64, 8, 16, torch.bfloat16, replace(SLIDING, sinks=meta(16))),
    ],
)
def test_attention_loads_pages_in_vectors(
    capability: int,
    head_dim: int,
    group: int,
    page_size: int,
    dtype: torch.dtype,
    variant: Variant,
) -> None:
    new = meta(8, 2, head_dim, dtype=dtype)
    pages = meta(99, page_size, head_dim, dtype=dtype)
    kernels = compile_one_each(
        capability,
        lambda: attention.append_and_attend(
            meta(8, 2 * group, head_dim, dtype=dtype),
            *(new, new, pages, pages),
            *table_of(64),
            64 * page_size,
            head_dim**-0.5,
            variant=variant,
        ),
        MAX_REGISTERS if variant.softcap is None else 168,  # three blocks of four warps
    )
    attend = kernels["_attend"]
    tile_bytes = attention.block_size(head_dim) * head_dim * dtype.itemsize
    per_thread = tile_bytes // (32 * attention.NUM_WARPS * 16)
    # A block of keys and one of values, in the loop and in each stage filled before it.
    assert attend.vector_loads >= 2 * per_thread * (attention.NUM_STAGES - 1)
    assert attend.narrow_loads <= 2 + 3 * (variant.sinks is not None)  # of the new key and value
    assert attend.shared_bytes <= 96 << 10
    assert kernels["_combine"].vector_loads > 0


@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "dtype"),
    [
        (64, 7, 16, torch.bfloat16),
        (96, 1, 32, torch.bfloat16),
        (128, 4, 16, torch.bfloat16),
        (128, 8, 64, torch.float16),
        (256, 2, 16, torch.bfloat16),
    ],
)
def test_attention_loads_int8_pages_in_vectors(
    capability: int, head_dim: int, group: int, page_size: int, dtype: torch.dtype
) -> None:
    new = meta(8, 2, head_dim, dtype=dtype)
    pages = meta(99, page_size, head_dim, dtype=torch.int8)
    kernels = compile_one_each(
        capability,
        lambda: attention.append_and_attend(
            meta(8, 2 * group, head_dim, dtype=dtype),
            *(new, new, pages, pages),
            *table_of(64),
            64 * page_size,
            head_dim**-0.5,
            meta(99, page_size, 2, dtype=torch.float16),
        ),
        MAX_REGISTERS if head_dim in (64, 128) else 168,  # three blocks of four warps
    )
    attend = kernels["_attend"]
    tile_bytes = attention.block_size(head_dim, is_int8=True) * head_dim
    per_thread = tile_bytes // (32 * attention.NUM_WARPS * 16)
    # Keys, in the loop and before it. Values are copied in 8 bytes, as their product wants them.
    assert attend.vector_loads >= per_thread * (attention.NUM_STAGES - 1)
    assert attend.narrow_loads <= 4  # of the new key and value, and of scales: 4 bytes per entry
    assert attend.shared_bytes <= 32 << 10


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
    table = meta(8, head_dim)
    kernels = compile_one_each(
        capability, lambda: rope.rotate(meta(8, 48, head_dim), table, table, 32, 8, norms)
    )
    kernel = kernels["_rotate"]
    assert kernel.vector_loads >= 2
    assert kernel.vector_stores >= 2
    assert kernel.narrow_loads <= 6  # of the tables and norms, which all heads share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_scattering_loads_and_stores_vectors(
    capability: int, head_dim: int, dtype: torch.dtype
) -> None:
    vectors = meta(999, head_dim, dtype=dtype)
    entries = (vectors, vectors, meta(999, dtype=torch.int32))
    kernels = compile_one_each(capability, lambda: scatter.scatter(entries, indices(999), entries))
    kernel = kernels["_scatter"]
    per_thread = 32 * head_dim * dtype.itemsize // (128 * 16)
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


def test_recompression_loads_pages_of_int8_in_vectors(capability: int) -> None:
    pages = meta(99, 16, 128, dtype=torch.int8)
    scales = meta(99, 16, 2, dtype=torch.float16)

    def recompress() -> None:
        queries, table, lengths = meta(64, 4, 32, 128), indices(64, 150), indices(64)
        recompression.window_scores(queries, pages, table, lengths, 0.125, scales)
        pool = (pages, pages, meta(99, 16, dtype=torch.int32), scales)
        recompression.compact(pool, table, indices(64, 2048), lengths)

    kernels = compile_one_each(capability, recompress)
    assert list(kernels) == ["_normalisers", "_shares", "_compact"]
    assert all(kernel.vector_loads >= 2 for kernel in kernels.values())


def test_recompression_is_not_compiled_again_for_other_windows_and_lengths(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, compiled = meta(99, 16, 64), []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1))

    def recompress(num_heads: int, window: int, width: int, num_kept: int) -> None:
        packed = indices(1 + num_heads * (1 + width))[1:]  # parts of one copy, on any address
        lengths, table = packed[:num_heads], packed[num_heads:].view(num_heads, width)
        queries = meta(num_heads, 4, window, 64)
        recompression.window_scores(queries, pages, table, lengths, 0.125)
        pool = (pages, meta(99, 16, 64), meta(99, 16, dtype=torch.int32))
        recompression.compact(pool, table, indices(num_heads, num_kept), lengths)

    compile_launches(capability, partial(recompress, 64, 32, 150, 2048))
    compiled.clear()
    for shape in ((1, 1, 1, 1), (7, 31, 9, 77), (64, 16, 16, 16)):
        compile_launches(capability, partial(recompress, *shape))
    assert not compiled


def test_attention_and_scatter_are_not_compiled_again_for_other_batches(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, compiled = meta(99, 16, 64), []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1))

    def attend(num_rows: int, width: int, most: int, num_entries: int) -> None:
        new = meta(num_rows, 2, 64)
        packed = indices(1 + 2 * num_rows)[1:]  # layers' parts of one tensor, on any address
        lengths = meta(1 + 2 * num_rows, dtype=torch.int32)[1:].view(num_rows, 2)
        table = (packed.view(num_rows, 2), indices(num_rows, 2, width), packed[:num_rows], lengths)
        attention.append_and_attend(
            *(meta(num_rows, 8, 64), new, new, pages, pages, *table), most, 0.125
        )
        entries = (meta(num_entries, 64), meta(num_entries, 64))
        positions = meta(1 + num_entries, dtype=torch.int32)[1:]
        pool = (pages.view(-1, 64), pages.view(-1, 64), meta(99 * 16, dtype=torch.int32))
        scatter.scatter((*entries, positions), indices(1 + num_entries)[1:], pool)

    compile_launches(capability, partial(attend, 3, 130, 2000, 33))
    compiled.clear()
    for shape in ((1, 1, 16, 1), (7, 128, 513, 32), (8, 1024, 16_384, 999)):
        compile_launches(capability, partial(attend, *shape))
    assert not compiled


def test_attention_in_float32_multiplies_in_float32(capability: int) -> None:
    new, pages = meta(8, 2, 64, dtype=torch.float32), meta(99, 16, 64, dtype=torch.float32)
    query = meta(8, 8, 64, dtype=torch.float32)
    (kernel,) = compile_launches(
        capability,
        lambda: attention.append_and_attend(
            *(query, new, new, pages, pages), *table_of(32), 512, 0.125
        ),
    )
    assert not kernel.has_half_products
