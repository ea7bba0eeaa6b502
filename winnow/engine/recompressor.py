"""Recompression: compressing the KV cache of running sequences back to their budget.

All that is due in a step is cut at once: every full layer and KV head of every sequence. Windowed
layers hold what their window does, and nothing of it is cut. The host knows
how many entries stay before the device has chosen which, so it waits for nothing.
"""

from dataclasses import dataclass, replace

from winnow.attention import AttentionOptions
from winnow.engine.head_cutter import HeadCutter
from winnow.engine.kv_manager import KVManager
from winnow.engine.query_ring import QueryRing, push_queries
from winnow.engine.runner import StepQueries
from winnow.engine.sequence import Sequence
from winnow.pruning_settings import Recompression


@dataclass(frozen=True, slots=True)
class RecompressionStats:
    """Totals since the start: recompressions, and the KV entries these kept and dropped."""

    recompressions: int = 0
    kept_entries: int = 0
    dropped_entries: int = 0


class Recompressor:
    """Recompresses sequences of one pool. options: how each layer attends; None before a step."""

    def __init__(self, memory: KVManager) -> None:
        self.options: list[AttentionOptions] | None = None
        self.stats = RecompressionStats()
        self._memory, self._pool = memory, memory.pool
        self._cutter = HeadCutter(self._pool)

    def observe(self, queries: StepQueries) -> None:
        """Record a step's queries, and recompress the sequences that exceed their growth limit.

        Queries that later ones will replace before the sequence can be cut are not recorded.
        """
        self.options = queries.options
        observed = {idx: seq for idx, seq in enumerate(queries.sequences) if seq.ring}
        if not observed:
            return
        lengths = self._pool.lengths([seq.row for seq in observed.values()])
        lengths = lengths[:, self._pool.windows.full]
        longest = dict(zip(observed, lengths.max((1, 2)).tolist(), strict=True))
        rings = {
            idx: seq.ring
            for idx, seq in observed.items()
            if seq.ring and _may_need(seq.ring, seq, longest[idx])
        }
        if rings:
            self._record(rings, queries)
        self.cut([seq for idx, seq in observed.items() if longest[idx] > seq.growth_limit])

    def _record(self, rings: dict[int, QueryRing], queries: StepQueries) -> None:
        """Add queries to rings, by their sequences' places in the batch."""
        push_queries(self._pool, rings, queries.layers)

    def cut(self, sequences: list[Sequence]) -> None:
        """Compress the sequences to their budgets, then lower their page reservations."""
        alike: dict[tuple[Recompression, int], list[Sequence]] = {}
        for seq in sequences:
            alike.setdefault(_settings_of(seq), []).append(seq)
        for (settings, _), own in alike.items():
            self._cut_alike(own, settings)

    def _cut_alike(self, sequences: list[Sequence], settings: Recompression) -> None:
        """Cut sequences of the same settings that hold as many queries."""
        rows = [seq.row for seq in sequences]
        rings = [seq.ring for seq in sequences if seq.ring]
        budgets = [seq.budget for seq in sequences if seq.budget is not None]
        before = self._pool.lengths(rows).sum((1, 2)).tolist()
        self._cut_rows(rows, rings, budgets, settings)
        after = self._pool.lengths(rows).sum((1, 2)).tolist()
        for seq, kept, total in zip(sequences, after, before, strict=True):
            self._account(seq, kept, total - kept)

    def _cut_rows(
        self,
        rows: list[int],
        rings: list[QueryRing],
        budgets: list[int],
        settings: Recompression,
    ) -> None:
        assert self.options is not None
        self._cutter.cut(rows, rings, budgets, settings, self.options)

    def _account(self, seq: Sequence, kept: int, dropped: int) -> None:
        """Lower the reservation of a sequence that was cut, and count it."""
        self.settle(seq)
        seq.reservation.recompressed_entries += dropped
        stats = self.stats
        self.stats = RecompressionStats(
            stats.recompressions + 1, stats.kept_entries + kept, stats.dropped_entries + dropped
        )

    def settle(self, seq: Sequence) -> None:
        """Lower the sequence's page reservation to what it can still grow to."""
        tokens_left = seq.spec.sampling.max_tokens - seq.sampling.num_drawn
        self._memory.settle(seq.row, tokens_left, seq.growth_limit + 1, assured=seq.spec.assured)


def _may_need(ring: QueryRing, seq: Sequence, longest: int) -> bool:
    """Whether the ring lacks queries, or a cut may come before it has gone round once."""
    return ring.num_tokens < ring.window_size or seq.may_be_cut(longest + ring.window_size - 1)


def _settings_of(seq: Sequence) -> tuple[Recompression, int]:
    """What must be equal to cut sequences together: all but when and how far, and the window."""
    assert seq.ring is not None
    same = replace(
        seq.spec.recompression, decode_budget=None, decode_floor=None, recompress_interval=1
    )
    return same, seq.ring.num_tokens
