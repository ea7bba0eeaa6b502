"""Writing an arriving layer into its pages: a program per block of entries."""

import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.gpu.launch import FUSED, require_contiguous

_ENTRIES = 32  # of a program


@triton.jit
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
