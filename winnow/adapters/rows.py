"""AdapterRows: which adapter each token of a forward pass has."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

NO_ADAPTER = 0  # the slot of tokens without one; adapters have those from 1 on


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRows:
    """All tokens have the adapter of one slot, or each its own.

    slot: of all; None: `others` says.
    others: [T, num_slots, 1] bool, false at slot i + 1 of the token's own adapter.
    """

    slot: int | None
    others: Tensor | None = None

    @classmethod
    def of_each(cls, slots: Tensor, num_slots: int) -> "AdapterRows":
        """slots: [T] int64, NO_ADAPTER to num_slots."""
        numbers = torch.arange(1, num_slots + 1, device=slots.device)
        return cls(None, (slots[:, None] != numbers)[:, :, None])

    def block(self, tokens: slice) -> "AdapterRows":
        """Those of some of the tokens."""
        return self if self.others is None else AdapterRows(None, self.others[tokens])


_applied: ContextVar[AdapterRows | None] = ContextVar("adapter rows", default=None)


@contextlib.contextmanager
def applied(rows: AdapterRows | None) -> Iterator[None]:
    """Within it, layers that this thread computes add what the rows' adapters do; None: nothing.

    Whoever feeds tokens to layers knows their adapters; what is between, such as transformers'
    layers, has no place for them among its arguments.
    """
    token = _applied.set(rows)
    try:
        yield
    finally:
        _applied.reset(token)


def applied_rows() -> AdapterRows | None:
    """The rows of the innermost `applied`; None outside of any."""
    return _applied.get()
