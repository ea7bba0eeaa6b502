"""Pages with random entries, as the KV pool has them, and the kernels of the device."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Entries of B rows of H_kv heads, each in pages of its own that lie scattered in the pool.

    keys, values: [num_pages, page_size, D].  positions: [num_pages, page_size] int32.
    table: [B, H_kv, P].  rows: [B] of the table, all.  lengths: [B, H_kv], at most `most`.
    slots: [B, H_kv] of each head's last entry.
    scales: [num_pages, page_size, 2] of keys and values that are int8.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    table: Tensor
    rows: Tensor
    lengths: Tensor
    most: int
    slots: Tensor
    scales: Tensor | None = None


def random_pages(lengths: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> Pages:
    """lengths: [B, H_kv] entries of each head, on the device."""
    device = lengths.device
    most = int(lengths.max())
    width = -(-most // page_size)
    num_pages = lengths.numel() * width
    size = (num_pages, page_size, head_dim)
    keys, values = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    table = torch.randperm(num_pages, device=device).view(*lengths.shape, width)
    last = (lengths - 1).clamp_min(0)
    page = table.gather(-1, (last // page_size)[..., None])[..., 0]
    positions = torch.arange(num_pages * page_size, dtype=torch.int32, device=device)
    return Pages(
        keys,
        values,
        positions.view(size[:2]),
        table,
        torch.arange(len(lengths), device=device),
        lengths,
        most,
        page * page_size + last % page_size,
    )


def kernel(module: str, device: torch.device) -> Any:  # noqa: ANN401
    """The module of kernels for the device: Triton's for CUDA, otherwise the references."""
    package = "winnow.kernels.gpu" if device.type == "cuda" else "winnow.kernels"
    return importlib.import_module(f"{package}.{module}")


def append_and_attend(query: Tensor, new: tuple[Tensor, Tensor], own: Pages) -> Tensor:
    """The device's kernel on all rows of the pages.

    query: [B, H, D].  new: keys and values of each row's last entry, [B, H_kv, D] each.
    """
    attend = kernel("attention", query.device).append_and_attend
    scaling = query.shape[2] ** -0.5
    pages = (own.keys, own.values, own.slots, own.table, own.rows, own.lengths, own.most)
    return attend(query, *new, *pages, scaling, own.scales)  # type: ignore[no-any-return]
