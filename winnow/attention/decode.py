"""Decode attention: one new token per row attends to paged keys and values.

A DecodeBackend reads the pages: `GatherBackend` copies and masks them, on any device; the kernel of
`PagedBackend` reads them in place, on CUDA devices.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Where one decode step writes and reads KV, for a batch of B rows.

    slots: [L, B, H_kv] slot that each head's new entry is written to.
    pages: [L, B, H_kv, P] pages of each head, the new token's included.
    lengths: [L, B, H_kv] entries of each head, the new token's included.
    """

    slots: Tensor
    pages: Tensor
    lengths: Tensor


class PagedKV(Protocol):
    """The interface of the KV pool that attention uses."""

    page_size: int
    device: torch.device

    def lengths(self, rows: list[int]) -> NDArray[np.int64]:
        """Entries per head of the given rows: [len(rows), L, H_kv]."""

    def plan_step(self, rows: list[int], positions: Tensor) -> StepPlan:
        """Make room for one more entry in every head of the rows; returns where it goes."""

    def append(self, layer_idx: int, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        """Write the step's new entries of a layer.  keys, values: [B, H_kv, D]."""

    def gather(self, layer_idx: int, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for the step: each [B, H_kv, P * page_size, D]."""

    @property
    def vectors(self) -> Tensor:
        """All pages' keys, then all their values: [2 * num_pages * page_size, D]."""


Plan = TypeVar("Plan")


class DecodeBackend(Protocol, Generic[Plan]):
    """A way to read pages. `Plan` is what it prepares once per step for all layers."""

    def plan(self, rows: list[int], positions: Tensor) -> Plan:
        """Make room for a new token of each row.  positions: [B]."""

    def attend(
        self,
        layer_idx: int,
        plan: Plan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
    ) -> Tensor:
        """Write the new tokens' entries of a layer, then attend to all entries of each head.

        keys, values: [B, H_kv, D].  query and the result: [B, H, 1, D].
        """


class StepAttention(Generic[Plan]):
    """An AttentionCall for one decode step of B rows; appends the new entries, then attends.

    positions: [B], of the new tokens; the constructor makes room for them.
    After the forward pass: `queries` holds each layer's [B, num_heads, head_dim], `scaling` the
    factor of the attention logits.
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
        return self._backend.attend(
            layer_idx, self._plan, query, key[:, :, 0], value[:, :, 0], scaling
        )
