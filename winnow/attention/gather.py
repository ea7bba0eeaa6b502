"""GatherBackend: copies pages into padded tensors and masks them; for devices without a kernel.

Rows of similar length share a tensor, so that short rows are not padded to the longest one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.attention.decode import PagedKV, StepPlan
from winnow.attention.fused import fused_kernels
from winnow.attention.options import AttentionOptions
from winnow.kernels.variant import Variant
from winnow.layers import Layer
from winnow.to_device import indices_to_device

_SHORT_PAGES = 32  # up to here, padding costs less than separate calls for shorter rows


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """Rows of similar length, and what they read.

    rows: their indices in the batch [b] int64; a slice if they are the whole batch.
    pages: [L, b, H_kv, P] of each head.
    visible: [L, b, H_kv, P * page_size] bool, False after a head's last entry.
    first: [b] of each kind of layer that is not full, as in `StepPlan.first_visible`.
    """

    rows: Tensor | slice
    pages: Tensor
    visible: Tensor
    first: dict[Layer, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class GatherPlan:
    """slots: as in StepPlan."""

    slots: Tensor
    groups: list[RowGroup]


class GatherBackend:
    """A DecodeBackend that reads one group of rows after another."""

    def __init__(self, pool: PagedKV) -> None:
        self._pool = pool
        self._layers = frozenset(pool.shape.layers)

    def plan(self, step: StepPlan) -> GatherPlan:
        return GatherPlan(step.slots, self._groups(step))

    def _groups(self, step: StepPlan) -> list[RowGroup]:
        if step.longest is None:
            return [self._group(step, slice(None), step.pages.shape[-1])]
        by_length = self._of_like_length(step.longest)
        widths = [
            -(-max(step.longest[idx] for idx in group) // self._pool.page_size)
            for group in by_length
        ]
        if len(widths) == 1:
            return [self._group(step, slice(None), widths[0])]
        indices = indices_to_device(by_length, self._pool.device)
        return [self._group(step, *own) for own in zip(indices, widths, strict=True)]

    def _group(self, step: StepPlan, index: Tensor | slice, width: int) -> RowGroup:
        pages = step.pages[..., :width].index_select(1, step.rows[index])
        entry = torch.arange(width * self._pool.page_size, device=self._pool.device)
        visible = entry < step.lengths[:, index, :, None]
        # Behind a head's last page the table names what others may have by now: masking them would
        # not remove a NaN. Page 0 is nobody's.
        pages *= visible[..., :: self._pool.page_size]
        first = step.first_visible(self._layers)
        own = {layer: positions[index] for layer, positions in first.items()}
        return RowGroup(index, pages, visible, own)

    def attend(
        self,
        layer_idx: int,
        plan: GatherPlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        self._pool.append(plan.slots[layer_idx], keys, values)
        output = torch.empty_like(query)
        for group in plan.groups:
            output[group.rows] = self._attend(layer_idx, group, query[group.rows], options)
        return output

    def _attend(
        self, layer_idx: int, group: RowGroup, query: Tensor, options: AttentionOptions
    ) -> Tensor:
        keys, values = self._pool.gather(group.pages[layer_idx])
        num_rows, num_kv_heads, _, head_dim = keys.shape
        # The queries of a group become rows of its KV head's query: [B, H_kv, group, D].
        grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim)
        visible = self._visible(layer_idx, group, options.layer)[:, :, None]  # [B, H_kv, 1, T]
        if options.is_plain_softmax:
            with fused_kernels(query.device):
                output = F.scaled_dot_product_attention(
                    grouped, keys, values, attn_mask=visible, scale=options.scaling
                )
        else:
            variant = Variant(softcap=options.softcap, sinks=options.sinks)
            logits = (grouped @ keys.mT).float() * options.scaling
            output = variant.weights(logits, ~visible).to(values.dtype) @ values
        return output.reshape(num_rows, -1, 1, head_dim)

    def _visible(self, layer_idx: int, group: RowGroup, layer: Layer) -> Tensor:
        """Which entries the rows attend to: [B, H_kv, P * page_size] bool."""
        visible = group.visible[layer_idx]
        if layer.is_full:
            return visible
        positions = self._pool.paged.positions[group.pages[layer_idx]].flatten(2)
        return visible & (positions >= group.first[layer][:, None, None])

    def _of_like_length(self, longest: list[int]) -> list[list[int]]:
        """Row indices, grouped so that lengths in a group differ by less than a factor of two.

        A row's length is that of its longest head; all rows up to _SHORT_PAGES are one group.
        """
        groups: dict[int, list[int]] = {}
        for idx, length in enumerate(longest):
            num_pages = max(-(-length // self._pool.page_size), _SHORT_PAGES)
            groups.setdefault((num_pages - 1).bit_length(), []).append(idx)
        return list(groups.values())
