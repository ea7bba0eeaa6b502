"""Scoring, choice and compaction for recompression, of many heads at once."""

import ctypes

import torch
from torch import Tensor

from winnow.kernels.cpu.attention import PAGE_ENTRIES
from winnow.kernels.cpu.library import LANES, is_usable, library


def can_recompress(keys: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take keys [num_pages, page_size, D] and queries of the dtype."""
    whole = keys.shape[1] % PAGE_ENTRIES == 0 and keys.shape[2] % (2 * LANES) == 0
    is_known = keys.dtype in (torch.bfloat16, torch.int8) and dtype == torch.bfloat16
    return is_known and keys.is_cpu and whole and is_usable()


def window_scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
    scales: Tensor | None = None,
) -> Tensor:
    """As `winnow.kernels.recompression.window_scores`."""
    addresses, sizes, scores = _call(queries, keys, pages, lengths, scales)
    library().winnow_window_scores(*addresses, *sizes, scaling, torch.get_num_threads())
    return scores


def rkv_scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scaling: float,
    scales: Tensor | None,
    kernel_size: int,
    redundancy_weight: float,
) -> Tensor:
    """As `winnow.compression.rkv.rkv_scores`."""
    addresses, sizes, scores = _call(queries, keys, pages, lengths, scales)
    library().winnow_rkv_scores(
        *addresses, *sizes, kernel_size, scaling, redundancy_weight, torch.get_num_threads()
    )
    return scores


def _call(
    queries: Tensor, keys: Tensor, pages: Tensor, lengths: Tensor, scales: Tensor | None
) -> tuple[list[int | None], list[int], Tensor]:
    """Addresses and sizes for a kernel that scores, and the scores it is to compute."""
    assert queries.dtype == torch.bfloat16
    assert keys.dtype == (torch.bfloat16 if scales is None else torch.int8)
    for part in (queries, keys, scales):
        assert part is None or part.is_contiguous(), f"{tuple(part.shape)}, {part.stride()}"
    _require_indices(pages=pages, lengths=lengths)
    num_heads, group, window, head_dim = queries.shape
    page_size, width = keys.shape[1], pages.shape[1]
    scores = queries.new_empty((num_heads, width * page_size), dtype=torch.float32)
    tensors = (queries, keys, scales, pages, lengths, scores)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return addresses, [num_heads, group, window, head_dim, page_size, width], scores


def best_entries(
    scores: Tensor, lengths: Tensor, window: int, budgets: Tensor, smallest: int, largest: int
) -> Tensor:
    """As `winnow.compression.recompress.best_entries`."""
    assert scores.is_contiguous() and scores.dtype == torch.float32
    assert smallest > window, f"a budget of {smallest} has no room beside a window of {window}"
    _require_indices(lengths=lengths, budgets=budgets)
    kept = budgets.new_zeros((len(scores), largest))
    library().winnow_best_entries(
        scores.data_ptr(),
        lengths.data_ptr(),
        budgets.data_ptr(),
        kept.data_ptr(),
        *scores.shape,
        window,
        largest,
        torch.get_num_threads(),
    )
    return kept


def compact(pool: tuple[Tensor, ...], pages: Tensor, kept: Tensor, lengths: Tensor) -> None:
    """As `winnow.kernels.recompression.compact`."""
    _require_indices(pages=pages, kept=kept, lengths=lengths)
    assert all(part.is_contiguous() for part in pool)
    page_size = pool[0].shape[1]
    addresses = [part.data_ptr() for part in pool]
    entry_bytes = [part.stride(1) * part.itemsize for part in pool]
    library().winnow_compact(
        (ctypes.c_void_p * len(pool))(*addresses),
        (ctypes.c_int64 * len(pool))(*entry_bytes),
        len(pool),
        pages.data_ptr(),
        kept.data_ptr(),
        lengths.data_ptr(),
        *pages.shape,
        kept.shape[1],
        page_size,
        torch.get_num_threads(),
    )


def _require_indices(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.int64, f"{name} are {tensor.dtype}"
        assert tensor.is_contiguous(), f"{name} {tuple(tensor.shape)} are not contiguous"
