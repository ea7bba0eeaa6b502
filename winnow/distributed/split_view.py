"""What a method sees of a layer whose heads several ranks have: each keeps its own.

Rank 0 gets one number per head and token of those that a method scores. It chooses once, by the
code that a single process runs, and what it chose goes to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.distributed.commands import PackLayer, ScoreLayer
from winnow.distributed.exchange import gather_heads, share, take
from winnow.distributed.heads import Split, join_heads
from winnow.distributed.rank_prefill import pack_own
from winnow.distributed.ranks import Ranks
from winnow.kv import LayerKV
from winnow.methods.base import HeadScore, LayerView


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitView(LayerView):
    """keys, queries: of rank 0's heads, which are `own`."""

    own: LayerView
    ranks: Ranks

    @property
    def num_kv_heads(self) -> int:
        return self.own.num_kv_heads * self.ranks.num_ranks

    def per_head(self, score: HeadScore) -> Tensor:
        with self.ranks.in_step():
            self.ranks.tell(ScoreLayer(score, self.window_size))
            return gather_heads(score(self.own), dim=0)

    def pack(self, values: Tensor, positions: Tensor, kept: list[Tensor] | None) -> LayerKV:
        with self.ranks.in_step():
            own = self.pack_own(values, positions, kept)
            others = range(1, self.ranks.num_ranks)
            return join_heads([own, *(self._take(rank, own, positions, kept) for rank in others)])

    def pack_own(
        self,
        values: Tensor,
        positions: Tensor,
        kept: list[Tensor] | None,
        shipment: int | None = None,
    ) -> LayerKV:
        """The kept KV of rank 0's heads. The others keep that of theirs.

        shipment: of what theirs is a part; None: they give it, for `pack`.
        """
        lengths = None if kept is None else tuple(map(len, kept))
        command = PackLayer(self.num_tokens, lengths, self.window_size, shipment)
        tokens = None if kept is None else torch.cat(kept).int()
        positions = positions.int()
        with self.ranks.in_step():
            self.ranks.tell(command)
            share(positions)
            if tokens is not None:
                share(tokens)
            split = Split(0, self.ranks.num_ranks)
            return pack_own(self.own, values, positions, command, tokens, split)

    def _take(
        self, rank: int, own: LayerKV, positions: Tensor, kept: Sequence[Tensor] | None
    ) -> LayerKV:
        """The kept KV of another rank's heads."""
        if kept is None:
            tokens = torch.arange(self.num_tokens, device=positions.device)
            kept = [tokens] * self.num_kv_heads
        heads = Split(rank, self.ranks.num_ranks).of(kept)
        of_entries = positions[torch.cat([*heads])].int()
        keys, values = take(rank, (2, len(of_entries), own.keys.shape[1]), own.keys)
        queries = take(rank, own.window_queries.shape, own.window_queries)
        lengths = tuple(map(len, heads))
        return LayerKV(own.layer_idx, keys, values, of_entries, lengths, queries)
