"""HeadCutter: what recompression does to the pages of a pool, many heads at once."""

import numpy as np
import torch
from torch import Tensor

from winnow.attention import AttentionOptions
from winnow.compression import recompression_rule
from winnow.compression.choice import REFERENCE, recompression_kernels
from winnow.compression.heads import PagedHeads
from winnow.compression.recompress import entries_to_keep
from winnow.engine.kv_pool import KVPool
from winnow.engine.long_heads import LongHeads
from winnow.engine.query_ring import QueryRing
from winnow.pruning_settings import Recompression
from winnow.to_device import indices_to_device

# Bytes of one pass's logits: for PyTorch on a CPU what fits its cache, else what is little of a
# device's memory.
_CPU_PASS_BYTES = 4 << 20
_PASS_BYTES = 256 << 20


class HeadCutter:
    """Cuts rows of one pool."""

    def __init__(self, pool: KVPool) -> None:
        shape = pool.shape
        group = shape.num_heads // shape.full_size.num_kv_heads
        self._pool = pool
        self._kernels = recompression_kernels(pool.paged.keys, shape.dtype, group)

    def cut(
        self,
        rows: list[int],
        rings: list[QueryRing],
        budgets: list[int],
        settings: Recompression,
        options: list[AttentionOptions],
    ) -> None:
        """Compress every head of each row's full layers to its budget, if it has more entries.

        rings: the rows'; they hold as many queries.  options: how each layer attends.
        """
        table = self._pool.table
        before, pages = table.heads(rows)  # [B, L, H_kv] and [B, L, H_kv, P]
        windows = self._pool.windows
        after = windows.cut(before, budgets)
        long = before > after
        queries = np.stack([ring.ordered_slots() for ring in rings])  # [B, L_full, H, w]
        num_kv_heads = self._pool.shape.full_size.num_kv_heads
        in_heads = (*queries.shape[:2], num_kv_heads, -1, queries.shape[-1])
        queries = queries.reshape(in_heads)[long[:, windows.full, :num_kv_heads]]  # [N, group, w]
        _, layers, kv_heads = long.nonzero()
        places = layers * num_kv_heads + kv_heads
        heads = LongHeads(pages[long], before[long], after[long], queries, places)
        how = options[windows.full[0]]
        sinks = self._sinks(options)
        is_small = self._pool.device.type == "cpu" and self._kernels is REFERENCE
        limit_bytes = _CPU_PASS_BYTES if is_small else _PASS_BYTES
        for some in heads.passes(self._pool.page_size, limit_bytes):
            self._cut_heads(some, settings, how, sinks)
        table.shorten(rows, after)

    def _sinks(self, options: list[AttentionOptions]) -> Tensor | None:
        """Those of all layers, by the KV heads of full ones [L * H_kv, group]; None without any."""
        shape = self._pool.shape
        if all(options[kv_idx].sinks is None for kv_idx in self._pool.windows.full):
            return None
        none = torch.full((shape.num_heads,), -torch.inf, device=self._pool.device)
        by_layer = [none if one.sinks is None else one.sinks.float() for one in options]
        return torch.stack(by_layer).view(-1, shape.num_heads // shape.full_size.num_kv_heads)

    def _cut_heads(
        self,
        some: LongHeads,
        settings: Recompression,
        how: AttentionOptions,
        sinks: Tensor | None,
    ) -> None:
        pages, before, after, slots, places = indices_to_device(
            [some.pages, some.before, some.after, some.queries, some.places], self._pool.device
        )
        paged = self._pool.paged
        heads = PagedHeads(
            queries=self._pool.vectors[slots],  # [N, group, w, D]
            keys=paged.keys,
            pages=pages,
            lengths=before,
            scaling=how.scaling,
            kernels=self._kernels,
            scales=paged.scales,
            softcap=how.softcap,
            sinks=None if sinks is None else sinks[places],
        )
        rule, budgets = recompression_rule(settings), some.after
        kept = entries_to_keep(heads, rule, after, int(budgets.min()), int(budgets.max()))
        self._kernels.compact(self._pool.in_pages, pages, kept, after)
