"""Which DecodeBackend a device gets."""

from typing import Any

from winnow.attention.decode import DecodeBackend, PagedKV
from winnow.attention.gather import GatherBackend
from winnow.attention.paged import PagedBackend
from winnow.catalog import load
from winnow.kernels.cpu.attention import can_read
from winnow.kernels.trial import passes

_ON_CPU = "winnow.kernels.cpu.attention:append_and_attend"
_ON_GPU = "winnow.kernels.gpu.attention:append_and_attend"  # imported for CUDA only: needs Triton


def decode_backend(pool: PagedKV, *groups: int) -> DecodeBackend[Any]:
    """A kernel that reads pages in place, where one works; otherwise GatherBackend.

    groups: query heads per KV head, of each kind of layers.
    """
    kernel = _kernel_for(pool)
    if kernel is not None and passes(
        "winnow.attention.paged:try_out",
        kernel,
        pool,
        *groups,
        otherwise="decode copies pages, because the attention kernel",
    ):
        return PagedBackend(pool, load(kernel))
    return GatherBackend(pool)


def _kernel_for(pool: PagedKV) -> str | None:
    """`module:function` of the one made for the pool's device and pages."""
    if pool.device.type == "cuda":
        return _ON_GPU
    return _ON_CPU if can_read(pool.paged.keys, pool.shape.dtype) else None
