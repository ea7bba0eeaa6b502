"""Attention within a prompt, and of a decode step over pages."""

import torch
from torch import Tensor

from winnow.kernels.cpu.library import LANES, fits, is_usable, library
from winnow.kernels.variant import PLAIN, Variant

PAGE_ENTRIES = LANES  # a page has a multiple of this


def can_attend(*tensors: Tensor) -> bool:
    """Whether the kernels take these queries, keys and values, and can be used here."""
    head_dims = {tensor.shape[-1] for tensor in tensors}
    if len(head_dims) > 1 or head_dims.pop() % (2 * LANES):
        return False
    return all(map(fits, tensors)) and is_usable()


def can_read(keys: Tensor, dtype: torch.dtype) -> bool:
    """Whether `append_and_attend` takes these pages [num_pages, page_size, D] for such queries."""
    _, page_size, head_dim = keys.shape
    return (
        dtype == torch.bfloat16
        and keys.is_cpu
        and page_size % PAGE_ENTRIES == 0
        and head_dim % (2 * LANES) == 0
        and is_usable()
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Tensor,
    scaling: float,
    *,
    first_keys: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of tokens to the keys up to their own, of the indices `own_keys` [T] int64.

    query: [H, T, D].  key, value: [H_kv, N, D].  Returns [H, T, D], contiguous token by token.
    first_keys: [T] int64, the first that each token sees; None: all see the first one. Both ascend.
    softcap, sinks: as in AttentionOptions.
    """
    num_heads, num_queries, head_dim = query.shape
    assert num_queries > 0, "there is no token"
    assert own_keys.dtype == torch.int64 and (first_keys is None or first_keys.dtype == torch.int64)
    own_keys = own_keys.contiguous()
    first_keys = None if first_keys is None else first_keys.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    output = query.new_empty((num_queries, num_heads, head_dim))
    library().winnow_attend(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        own_keys.data_ptr(),
        _address(first_keys),
        _address(sinks),
        output.data_ptr(),
        num_queries,
        num_heads,
        len(key),
        head_dim,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        scaling,
        softcap or 0.0,
        torch.get_num_threads(),
    )
    return output.transpose(0, 1)


def append_and_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pages: Tensor,
    rows: Tensor,
    lengths: Tensor,
    most: int,
    scaling: float,
    scales: Tensor | None = None,
    variant: Variant = PLAIN,
) -> Tensor:
    """As `winnow.kernels.attention.append_and_attend`, for pages of a multiple of PAGE_ENTRIES."""
    assert slots.dtype == pages.dtype == rows.dtype == torch.int64
    assert lengths.dtype == torch.int32
    for own in (query, new_keys, new_values):
        assert own.dtype == torch.bfloat16 and own.stride(2) == 1, f"{own.dtype}, {own.stride()}"
    assert keys.dtype == values.dtype == (torch.bfloat16 if scales is None else torch.int8)
    first, positions = variant.first, variant.positions
    assert first is None or (first.dtype == torch.int64 and positions is not None)
    assert positions is None or positions.dtype == torch.int32
    sinks = None if variant.sinks is None else variant.sinks.float().contiguous()
    parts = (slots, pages, rows, lengths, keys, values, scales, first, positions)
    assert all(part.is_contiguous() for part in parts if part is not None)
    num_rows, num_heads, head_dim = query.shape
    output = query.new_empty(query.shape)
    library().winnow_append_and_attend(
        query.data_ptr(),
        new_keys.data_ptr(),
        new_values.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        _address(scales),
        slots.data_ptr(),
        pages.data_ptr(),
        rows.data_ptr(),
        lengths.data_ptr(),
        _address(first),
        _address(positions),
        _address(sinks),
        output.data_ptr(),
        num_rows,
        num_heads,
        pages.shape[1],
        head_dim,
        keys.shape[1],
        pages.shape[2],
        most,
        *query.stride()[:2],
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        scaling,
        variant.softcap or 0.0,
        torch.get_num_threads(),
    )
    return output


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
