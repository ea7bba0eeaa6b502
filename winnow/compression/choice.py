"""Which kernels recompression uses on a device."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from winnow.catalog import load
from winnow.compression.heads import RecompressionKernels
from winnow.compression.recompress import best_entries
from winnow.compression.rkv import rkv_scores
from winnow.kernels import recompression
from winnow.kernels.cpu import recompression as on_cpu
from winnow.kernels.trial import passes
from winnow.kv_quantization import quantize

REFERENCE = RecompressionKernels(
    recompression.window_scores, rkv_scores, best_entries, recompression.compact
)
ON_CPU = RecompressionKernels(
    on_cpu.window_scores, on_cpu.rkv_scores, on_cpu.best_entries, on_cpu.compact
)

_TRITON = "winnow.kernels.gpu.recompression"  # imported for CUDA devices only
_TOLERANCE = 0.02  # of an entry's share of a query's attention, in 16 bits
_WINDOW = 8


def recompression_kernels(keys: Tensor, dtype: torch.dtype, group: int) -> RecompressionKernels:
    """The Triton or C++ kernels where they work, otherwise PyTorch's.

    keys: [num_pages, page_size, D], of which only device, type and shape matter.
    dtype: of the queries.  group: query heads per KV head.
    """
    if keys.device.type == "cuda" and passes(
        f"{__name__}:try_out_triton",
        keys,
        dtype,
        group,
        otherwise="recompression uses PyTorch, because its kernel",
    ):
        return triton_kernels()
    return ON_CPU if on_cpu.can_recompress(keys, dtype) else REFERENCE


def triton_kernels() -> RecompressionKernels:
    """Raises ImportError without Triton."""
    return replace(
        REFERENCE,
        window_scores=load(f"{_TRITON}:window_scores"),
        compact=load(f"{_TRITON}:compact"),
    )


def try_out_triton(keys: Tensor, dtype: torch.dtype, group: int) -> None:
    """`try_out` of the Triton kernels; raises ImportError without Triton."""
    try_out(triton_kernels(), keys, dtype, group)


def try_out(kernels: RecompressionKernels, keys: Tensor, dtype: torch.dtype, group: int) -> None:
    """Score and move entries of three heads in pages of their own, beside the reference.

    keys: of a pool, [num_pages, page_size, head_dim].  dtype: the model's.  group: query heads for
    each KV head.
    Raises RuntimeError if the results differ, or whatever kept the kernels from running.
    """
    device, (_, page_size, head_dim) = keys.device, keys.shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn((*shape, head_dim), generator=generator, device=device)
        return drawn.to(dtype)

    width = 130 // page_size + 1
    pages = torch.arange(3 * width, device=device).view(3, width)
    lengths = torch.tensor([_WINDOW, 65, 130], device=device)
    queries = random(3, group, _WINDOW)
    entries: Any = random(2, 3 * width, page_size)
    scales: Any = ()
    if keys.dtype == torch.int8:
        entries, pairs = quantize(entries)
        scales = (pairs.movedim(0, -1).contiguous(),)
    positions = torch.arange(3 * width * page_size, dtype=torch.int32, device=device)
    parts = (*entries, positions.view(-1, page_size), *scales)
    kept = torch.arange(_WINDOW, device=device) * torch.tensor([[1], [8], [16]], device=device)
    results = []
    for one in (kernels, REFERENCE):
        pool = tuple(part.clone() for part in parts)
        scales_of_pool = pool[3] if scales else None
        scores = one.window_scores(queries, pool[0], pages, lengths, head_dim**-0.5, scales_of_pool)
        one.compact(pool, pages, kept, torch.tensor([3, 7, _WINDOW], device=device))
        results.append((scores, *pool))
    (scores, *moved), (expected, *should_be) = results
    error = float((scores - expected).abs().max()) / (group * _WINDOW)
    if not error <= _TOLERANCE:
        raise RuntimeError(f"their scores are {error:.2g} off; the limit is {_TOLERANCE}")
    if not all(map(torch.equal, moved, should_be)):
        raise RuntimeError("they move entries to the wrong places")
