"""Attention of one new token per row over the pages of its KV heads.

The pages of a layer are gathered into padded tensors and masked, one for all rows of like length,
so that a long row does not make the others' padding as long; a kernel that reads pages in place
belongs here, behind the same call, for GPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.engine.kv_pool import KVPool, StepPlan

_SHORT_PAGES = 32  # up to here, padding costs less than calls of their own for shorter rows


class PagedAttention:
    """An AttentionCall for one decode step of B rows; appends the new entries, then attends.

    positions: [B], of the new tokens; room for them is made at once.
    After the forward pass: `queries` holds each layer's [B, num_heads, head_dim], `scaling` the
    logits' factor.
    """

    scaling: float

    def __init__(self, pool: KVPool, rows: list[int], positions: Tensor) -> None:
        self._pool = pool
        self._groups = [
            (group, pool.plan_step([rows[idx] for idx in group.tolist()], positions[group]))
            for group in _of_like_length(pool, rows)
        ]
        self.queries: list[Tensor] = []

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self.scaling = scaling
        self.queries.append(query[:, :, 0])
        output = torch.empty_like(query)
        for group, plan in self._groups:
            self._pool.append(layer_idx, plan, key[group, :, 0], value[group, :, 0])
            output[group] = self._attend(layer_idx, plan, query[group], scaling)
        return output

    def _attend(self, layer_idx: int, plan: StepPlan, query: Tensor, scaling: float) -> Tensor:
        keys, values = self._pool.gather(layer_idx, plan)
        num_rows, num_kv_heads, _, head_dim = keys.shape
        # The queries that share a KV head become its query rows: [B, H_kv, group, D].
        grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim)
        visible = plan.visible[layer_idx][:, :, None]  # [B, H_kv, 1, T]
        output = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=visible, scale=scaling
        )
        return output.reshape(num_rows, -1, 1, head_dim)

    def stacked_queries(self) -> Tensor:
        """The step's queries of every layer: [L, B, num_heads, head_dim]."""
        return torch.stack(self.queries)


def _of_like_length(pool: KVPool, rows: list[int]) -> list[Tensor]:
    """Indices of rows in groups, within which lengths differ by less than a factor of two.

    A row is as long as its longest head, and all short ones are alike.
    """
    groups: dict[int, list[int]] = {}
    for idx, length in enumerate(pool.lengths(rows).amax((1, 2)).tolist()):
        num_pages = max(length // pool.page_size + 1, _SHORT_PAGES)
        groups.setdefault((num_pages - 1).bit_length(), []).append(idx)
    return [torch.tensor(group, device=pool.device) for group in groups.values()]
