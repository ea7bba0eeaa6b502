"""GatherBackend: copies pages into padded tensors and masks them; any device, best on a CPU.

Rows of similar length share a tensor, so that short rows are not padded to the longest one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.attention.decode import PagedKV, StepPlan
from winnow.to_device import indices_to_device

_SHORT_PAGES = 32  # up to here, padding costs less than separate calls for shorter rows


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """Rows of similar length, and the plan to read them.

    rows: their indices in the batch [b] int64; a slice if they are the whole batch.
    visible: [L, b, H_kv, P * page_size] bool, False after a head's last entry.
    """

    rows: Tensor | slice
    step: StepPlan
    visible: Tensor


class GatherBackend:
    """A DecodeBackend whose plan is a list of row groups."""

    def __init__(self, pool: PagedKV) -> None:
        self._pool = pool

    def plan(self, rows: list[int], positions: Tensor) -> list[RowGroup]:
        groups = self._of_like_length(rows)
        if len(groups) == 1:
            return [self._group(slice(None), rows, positions)]
        indices = indices_to_device(groups, self._pool.device)
        return [
            self._group(index, [rows[idx] for idx in group], positions[index])
            for group, index in zip(groups, indices, strict=True)
        ]

    def _group(self, index: Tensor | slice, rows: list[int], positions: Tensor) -> RowGroup:
        step = self._pool.plan_step(rows, positions)
        num_slots = step.pages.shape[-1] * self._pool.page_size
        entry = torch.arange(num_slots, device=self._pool.device)
        return RowGroup(index, step, entry < step.lengths[..., None])

    def attend(
        self,
        layer_idx: int,
        plan: list[RowGroup],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
    ) -> Tensor:
        output = torch.empty_like(query)
        for group in plan:
            self._pool.append(layer_idx, group.step, keys[group.rows], values[group.rows])
            output[group.rows] = self._attend(layer_idx, group, query[group.rows], scaling)
        return output

    def _attend(self, layer_idx: int, group: RowGroup, query: Tensor, scaling: float) -> Tensor:
        keys, values = self._pool.gather(layer_idx, group.step)
        num_rows, num_kv_heads, _, head_dim = keys.shape
        # The queries of a group become rows of its KV head's query: [B, H_kv, group, D].
        grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim)
        visible = group.visible[layer_idx][:, :, None]  # [B, H_kv, 1, T]
        output = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=visible, scale=scaling
        )
        return output.reshape(num_rows, -1, 1, head_dim)

    def _of_like_length(self, rows: list[int]) -> list[list[int]]:
        """Row indices, grouped so that lengths in a group differ by less than a factor of two.

        A row's length is that of its longest head; all rows up to _SHORT_PAGES are one group.
        """
        pool = self._pool
        groups: dict[int, list[int]] = {}
        for idx, length in enumerate(pool.lengths(rows).max((1, 2)).tolist()):
            num_pages = max(length // pool.page_size + 1, _SHORT_PAGES)
            groups.setdefault((num_pages - 1).bit_length(), []).append(idx)
        return list(groups.values())
