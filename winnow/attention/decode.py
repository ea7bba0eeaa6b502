"""Decode attention: one new token per row attends to paged keys and values.

A DecodeBackend reads the pages: the kernel of `PagedBackend` reads them in place, on CUDA devices
and on CPUs that have one; `GatherBackend` copies and masks them, on any device.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from winnow.attention.options import AttentionOptions
from winnow.kv import KVSize, ModelShape, padded
from winnow.layers import Layer
from winnow.visibility import first_visible


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Where one decode step writes and reads KV, for a batch of B rows.

    rows: [B] of the page table.
    positions: [B] int64, of the new tokens.
    slots: [L, B, H_kv] slot that each head's new entry is written to.
    pages: [L, num_rows, H_kv, P] int64, the page table, of all rows.
    lengths: [L, B, H_kv] entries of each head, the new token's included.
    longest: entries of each row's longest head; None where only the device knows.
    """

    rows: Tensor
    positions: Tensor
    slots: Tensor
    pages: Tensor
    lengths: Tensor
    longest: list[int] | None

    def first_visible(self, layers: Iterable[Layer]) -> dict[Layer, Tensor]:
        """The first position [B] that the new tokens attend to, in each kind of windowed layer."""
        windowed = {layer for layer in layers if layer.window is not None}
        return {layer: first_visible(layer, self.positions) for layer in windowed}


@dataclass(frozen=True, slots=True, eq=False)
class PagedEntries:
    """Keys and values of all pages: [num_pages, page_size, D].

    positions: [num_pages, page_size] int32, ascending within a head.
    scales: [num_pages, page_size, 2] float16, of keys and of values that are int8; else None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scales: Tensor | None = None


class PagedKV(Protocol):
    """The interface of the KV pool that attention uses."""

    shape: ModelShape
    page_size: int
    device: torch.device

    def append(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write new entries of a layer.  slots: [B, H_kv].  keys, values: [B, H_kv, D]."""

    def gather(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pages [B, H_kv, P]: each [B, H_kv, P * page_size, D]."""

    @property
    def paged(self) -> PagedEntries:
        """All pages' keys and values."""


Plan = TypeVar("Plan")


class DecodeBackend(Protocol, Generic[Plan]):
    """A way to read pages. `Plan` is what it prepares once per step for all layers."""

    def plan(self, step: StepPlan) -> Plan:
        """Prepare to read what the step reads."""

    def attend(
        self,
        layer_idx: int,
        plan: Plan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Write the new tokens' entries of a layer, then attend to all entries of each head.

        keys, values: [B, H_kv, D].  query and the result: [B, H, 1, D].
        """


class StepAttention(Generic[Plan]):
    """An AttentionCall for one decode step of B rows; appends the new entries, then attends.

    Layers are called in order. Those without keys and values call nothing, and are not counted: the
    plan has the others alone. To the backend all look like the largest, `shape.largest`: shorter
    queries, keys and values end with zeros, and heads that a layer lacks have no entries.
    After the forward pass: `queries` holds each layer's [B, num_heads, key_dim], `options` how it
    attended.
    """

    def __init__(self, backend: DecodeBackend[Plan], step: StepPlan, shape: ModelShape) -> None:
        self._backend = backend
        self._plan = backend.plan(step)
        self._largest = shape.largest
        self.queries: list[Tensor] = []
        self.options: list[AttentionOptions] = []

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        kv_idx = len(self.queries)
        self.options.append(options)
        self.queries.append(query.select(2, 0))  # which is quicker than an index
        keys, values = key.select(2, 0), value.select(2, 0)
        own = KVSize(keys.shape[1], keys.shape[2], values.shape[2])
        if own == self._largest:
            return self._backend.attend(kv_idx, self._plan, query, keys, values, options)
        num_heads, num_kv_heads = query.shape[1], self._largest.num_kv_heads
        padded_heads = num_heads // own.num_kv_heads * num_kv_heads
        sinks = options.sinks
        output = self._backend.attend(
            kv_idx,
            self._plan,
            self._widened(query, padded_heads),
            self._widened(keys, num_kv_heads),
            self._widened(values, num_kv_heads),
            options if sinks is None else replace(options, sinks=padded(sinks, padded_heads)),
        )
        return output[:, :num_heads, :, : own.value_dim]

    def _widened(self, vectors: Tensor, num_heads: int) -> Tensor:
        """[B, heads, ..., numbers] with zeros up to `num_heads` and to the most numbers."""
        wide = (*vectors.shape[2:-1], self._largest.key_dim)
        output = vectors.new_zeros((vectors.shape[0], num_heads, *wide))
        output[:, : vectors.shape[1], ..., : vectors.shape[-1]] = vectors
        return output
