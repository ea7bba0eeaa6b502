"""Attention of one new token per row over the pages of its KV heads.

On a CPU the pages of a layer are gathered into one padded tensor and masked; a kernel that reads
them in place belongs here, behind the same call, for GPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.engine.kv_pool import KVPool, StepPlan


class PagedAttention:
    """An AttentionCall for one decode step of B rows; appends the new entries, then attends.

    After the forward pass: `queries` holds each layer's [B, num_heads, head_dim], `scaling` the
    logits' factor.
    """

    scaling: float

    def __init__(self, pool: KVPool, plan: StepPlan) -> None:
        self._pool = pool
        self._plan = plan
        self.queries: list[Tensor] = []

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self.scaling = scaling
        self.queries.append(query[:, :, 0])
        self._pool.append(layer_idx, self._plan, key[:, :, 0], value[:, :, 0])
        keys, values = self._pool.gather(layer_idx, self._plan)
        num_rows, num_kv_heads, _, head_dim = keys.shape
        # The queries that share a KV head become its query rows: [B, H_kv, group, D].
        grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim)
        visible = self._plan.visible[layer_idx][:, :, None]  # [B, H_kv, 1, T]
        output = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=visible, scale=scaling
        )
        return output.reshape(num_rows, -1, 1, head_dim)

    def stacked_queries(self) -> Tensor:
        """The step's queries of every layer: [L, B, num_heads, head_dim]."""
        return torch.stack(self.queries)
