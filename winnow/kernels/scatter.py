"""Writing an arriving layer into its pages."""

from torch import Tensor


def scatter(
    entries: tuple[Tensor, Tensor, Tensor], slots: Tensor, pool: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Copy a layer's keys [n, D], values [n, D] and positions [n] to their `slots` [n].

    pool: keys and values [num_slots, D] and positions [num_slots] of all pages, written in place.
    """
    for own, target in zip(entries, pool, strict=True):
        target.index_copy_(0, slots, own)
