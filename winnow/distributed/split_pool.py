"""Rank 0's side of decode: its heads' pages, and the other ranks told of all that happens to rows.

Prefill's KV comes to each rank, for a row that rank 0 has named; or whole, from a prefill worker of
one process, and rank 0 gives each rank its heads. It collects them when a sequence is swapped out
or moves to another worker.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.distributed.commands import (
    Arrived,
    Clear,
    Cut,
    Expect,
    OpenPool,
    OpenRing,
    ReadLayer,
    Record,
    TakeArrived,
    WriteLayer,
)
from winnow.distributed.heads import Split, join_heads, split_heads
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_table import SplitTable
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.page_table import Lengths, Slots
from winnow.engine.query_ring import QueryRing
from winnow.engine.recompressor import Recompressor
from winnow.engine.runner import StepQueries
from winnow.kv import LayerKV
from winnow.pruning_settings import Recompression

if TYPE_CHECKING:
    from winnow.wire import Expected  # loads protobuf, which engines do without


class SplitPool(KVPool):
    """The pool of rank 0's heads. What it says of lengths and pages holds for all ranks."""

    def __init__(
        self, model: DecoderModel, config: KVPoolConfig, num_rows: int, ranks: Ranks
    ) -> None:
        config = replace(config, num_ranks=ranks.num_ranks)
        super().__init__(model.shape, config, num_rows, model.device)
        self.ranks = ranks
        self.table: SplitTable = SplitTable(
            self.shape, self.page_size, self.num_pages, num_rows, ranks.num_ranks
        )
        ranks.tell(OpenPool(config, num_rows))

    def lengths(self, rows: list[int]) -> Lengths:
        return np.concatenate(self.table.all_lengths(rows), axis=2)

    def clear(self, row: int) -> None:
        try:
            self.ranks.tell(Clear(row))
        finally:
            super().clear(row)

    def import_layer(self, row: int, layer: LayerKV) -> LayerKV:
        own, *others = split_heads(layer, self.ranks.num_ranks)
        self.ranks.tell_each([WriteLayer(row, part.to("cpu")) for part in others])
        self.table.replace_others(row, others)
        self.write_layer(row, own)
        return own

    @property
    def own_heads(self) -> range:
        """The KV heads of this rank."""
        return Split(0, self.ranks.num_ranks).heads(self.shape.num_kv_heads * self.ranks.num_ranks)

    def expect(self, row: int, request_id: str, attempt: int, expected: "Expected") -> None:
        """Have the other ranks take their heads' parts of a prompt's KV, as they come there."""
        self.ranks.tell(Expect(row, request_id, attempt, expected))

    def take_arrived(self, row: int) -> list[Arrived]:
        """What came to each of the other ranks; counted, if all of it came whole."""
        arrived = self.ranks.ask(TakeArrived(row), Arrived)
        if all(rank.damage is None for rank in arrived):
            lengths = [dict(enumerate(rank.head_lengths)) for rank in arrived]
            self.table.replace_arrived(row, lengths)
        return arrived

    def export_layer(
        self, row: int, layer_idx: int, window_queries: Tensor | None = None
    ) -> LayerKV:
        own = self.read_layer(row, layer_idx, window_queries)
        return join_heads([own, *self.ranks.ask(ReadLayer(row, layer_idx), LayerKV)])

    def pages_to_go_on(self, layers: list[LayerKV]) -> int:
        by_layer = [split_heads(layer, self.ranks.num_ranks) for layer in layers]
        by_rank = zip(*by_layer, strict=True)
        return max(super(SplitPool, self).pages_to_go_on(list(own)) for own in by_rank)

    def place_queries(self, row: int, num_queries: int) -> Slots:
        window_size = num_queries // (len(self.windows.full) * self.shape.num_heads)
        self.ranks.tell(OpenRing(row, window_size))
        return super().place_queries(row, num_queries)


class SplitRecompressor(Recompressor):
    """Has every rank recompress its own heads: no rule for running sequences looks across heads."""

    def __init__(self, memory: KVManager, pool: SplitPool) -> None:
        super().__init__(memory)
        self._split = pool

    def _record(self, rings: dict[int, QueryRing], queries: StepQueries) -> None:
        self._split.ranks.tell(Record(list(rings)))
        super()._record(rings, queries)

    def _cut_rows(
        self,
        rows: list[int],
        rings: list[QueryRing],
        budgets: list[int],
        settings: Recompression,
    ) -> None:
        self._split.ranks.tell(Cut(rows, budgets, settings))
        self._split.table.cut_others(rows, budgets)
        super()._cut_rows(rows, rings, budgets, settings)
