"""Attention of one new token per row over paged keys and values.

How pages are read is a backend's affair: `GatherBackend` copies and masks them, on any device. A
kernel that reads them in place is another backend.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Where one decode step writes and reads, for a batch of B rows.

    slots: [L, B, H_kv] entry that each head's new token goes to.
    pages: [L, B, H_kv, P] pages of each head, the new token's included.
    lengths: [L, B, H_kv] entries of each head, the new token's included.
    """

    slots: Tensor
    pages: Tensor
    lengths: Tensor


class PagedKV(Protocol):
    """The pool, as far as attention knows it."""

    page_size: int
    device: torch.device

    def lengths(self, rows: list[int]) -> Tensor:
        """Entries per head of the given rows: [len(rows), L, H_kv] int64."""

    def plan_step(self, rows: list[int], positions: Tensor) -> StepPlan:
        """Makes room for one more entry in every head of the rows and says where it goes."""

    def append(self, layer_idx: int, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        """Writes the step's new entries of a layer.  keys, values: [B, H_kv, D]."""

    def gather(self, layer_idx: int, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for the step: each [B, H_kv, P * page_size, D]."""


Plan = TypeVar("Plan")


class DecodeBackend(Protocol, Generic[Plan]):
    """One way to read pages. `Plan` is whatever it prepares once per step for all layers."""

    def plan(self, rows: list[int], positions: Tensor) -> Plan:
        """Makes room for a new token of each row.  positions: [B]."""

    def append(self, layer_idx: int, plan: Plan, keys: Tensor, values: Tensor) -> None:
        """Writes the new tokens' entries of a layer.  keys, values: [B, H_kv, D]."""

    def attend(self, layer_idx: int, plan: Plan, query: Tensor, scaling: float) -> Tensor:
        """Attention over all entries of each head.  query: [B, H, 1, D], as returned."""


class StepAttention(Generic[Plan]):
    """An AttentionCall for one decode step of B rows; appends the new entries, then attends.

    positions: [B], of the new tokens; room for them is made at once.
    After the forward pass: `queries` holds each layer's [B, num_heads, head_dim], `scaling` the
    logits' factor.
    """

    scaling: float

    def __init__(self, backend: DecodeBackend[Plan], rows: list[int], positions: Tensor) -> None:
        self._backend = backend
        self._plan = backend.plan(rows, positions)
        self.queries: list[Tensor] = []

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self.scaling = scaling
        self.queries.append(query[:, :, 0])
        self._backend.append(layer_idx, self._plan, key[:, :, 0], value[:, :, 0])
        return self._backend.attend(layer_idx, self._plan, query, scaling)
