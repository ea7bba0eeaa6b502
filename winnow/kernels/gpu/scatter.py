"""Writing an arriving layer into its pages: a program per block of entries."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels import scatter as reference
from winnow.kernels.gpu.launch import FUSED, require_contiguous

_ENTRIES = 32  # of a program
# What differs from one layer to the next; a kernel that depended on it would be compiled again
# while KV arrives.
_UNSPECIALIZED = {
    "do_not_specialize": ["num_entries"],
    "do_not_specialize_on_alignment": ["positions_ptr", "slots_ptr"],
}


@triton.jit(**_UNSPECIALIZED)
def _scatter(
    keys_ptr,
    values_ptr,
    positions_ptr,
    slots_ptr,
    pool_keys_ptr,
    pool_values_ptr,
    pool_positions_ptr,
    num_entries,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    dim = tl.arange(0, D_PAD)
    is_entry = entry < num_entries
    inside = is_entry[:, None] & (dim < D)[None, :]
    slot = tl.load(slots_ptr + entry, mask=is_entry, other=0).to(tl.int64)
    source = entry[:, None] * D + dim[None, :]
    target = slot[:, None] * D + dim[None, :]
    keys = tl.load(keys_ptr + source, mask=inside, other=0.0)
    values = tl.load(values_ptr + source, mask=inside, other=0.0)
    positions = tl.load(positions_ptr + entry, mask=is_entry, other=0)
    tl.store(pool_keys_ptr + target, keys, mask=inside)
    tl.store(pool_values_ptr + target, values, mask=inside)
    tl.store(pool_positions_ptr + slot, positions, mask=is_entry)


def scatter(
    entries: tuple[Tensor, Tensor, Tensor], slots: Tensor, pool: tuple[Tensor, Tensor, Tensor]
) -> None:
    """As `winnow.kernels.scatter.scatter`."""
    for tensor in (*entries, slots, *pool):
        require_contiguous(tensor=tensor)
    num_entries, head_dim = entries[0].shape
    if not num_entries:
        return
    _scatter[(triton.cdiv(num_entries, _ENTRIES),)](
        *entries,
        slots,
        *pool,
        num_entries,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        ENTRIES=_ENTRIES,
        **FUSED,
    )


def try_out(pool: tuple[Tensor, Tensor, Tensor]) -> None:
    """Scatter a few entries like the pool's, beside the reference.

    Raises RuntimeError if the results differ, or whatever kept the kernel from running.
    """
    num_entries = _ENTRIES + 1
    slots = torch.arange(num_entries, device=pool[0].device).flip(0) * 3
    keys, values, positions = (_numbers(part, num_entries) for part in pool)
    written = []
    for write in (scatter, reference.scatter):
        target = tuple(part.new_zeros((3 * num_entries, *part.shape[1:])) for part in pool)
        write((keys, values, positions), slots, (target[0], target[1], target[2]))
        written.append(target)
    for name, found, expected in zip(("keys", "values", "positions"), *written, strict=True):
        if not torch.equal(found, expected):
            raise RuntimeError(f"it writes other {name} than it is given")


def _numbers(part: Tensor, num_entries: int) -> Tensor:
    """Entries of small numbers that differ, like those of a part of the pool."""
    size = (num_entries, *part.shape[1:])
    return (torch.arange(prod(size), device=part.device) % 101).view(size).to(part.dtype)
