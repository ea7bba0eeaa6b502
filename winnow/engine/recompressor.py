"""Recompression: compressing the KV cache of running sequences back to their budget."""

from dataclasses import dataclass

from winnow.compression import recompression_rule
from winnow.compression.recompress import recompress_layer
from winnow.engine.kv_manager import KVManager
from winnow.engine.runner import StepQueries
from winnow.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RecompressionStats:
    """Totals since the start: recompressions, and the KV entries these kept and dropped."""

    recompressions: int = 0
    kept_entries: int = 0
    dropped_entries: int = 0


class Recompressor:
    """Recompresses sequences of one pool. scaling: of the attention logits; None before a step."""

    def __init__(self, memory: KVManager) -> None:
        self.scaling: float | None = None
        self.stats = RecompressionStats()
        self._memory, self._pool = memory, memory.pool

    def observe(self, queries: StepQueries) -> None:
        """Record a step's queries, and recompress each sequence that exceeds its growth limit."""
        self.scaling = queries.scaling
        sequences = queries.sequences
        observed = [(idx, seq, seq.ring) for idx, seq in enumerate(sequences) if seq.ring]
        if not observed:
            return
        stacked = queries.stacked()
        longest = self._pool.lengths([seq.row for seq in sequences]).max((1, 2))
        for idx, seq, ring in observed:
            ring.push(stacked[:, idx])
            if longest[idx] > seq.growth_limit:
                self.cut(seq)

    def cut(self, seq: Sequence) -> None:
        """Compress every layer to the sequence's budget, then lower its page reservation."""
        assert seq.ring is not None and seq.budget is not None and self.scaling is not None
        rule = recompression_rule(seq.spec.recompression)
        kept = dropped = 0
        for layer_idx in range(self._pool.shape.num_layers):
            before = self._pool.read_layer(seq.row, layer_idx, seq.ring.ordered(layer_idx))
            after = recompress_layer(before, self.scaling, rule, seq.budget)
            self._pool.write_layer(seq.row, after)
            kept += after.num_entries
            dropped += before.num_entries - after.num_entries
        self.settle(seq)
        seq.reservation.recompressed_entries += dropped
        stats = self.stats
        self.stats = RecompressionStats(
            stats.recompressions + 1, stats.kept_entries + kept, stats.dropped_entries + dropped
        )

    def settle(self, seq: Sequence) -> None:
        """Lower the sequence's page reservation to what it can still grow to."""
        tokens_left = seq.spec.sampling.max_tokens - seq.num_generated
        self._memory.settle(seq.row, tokens_left, seq.growth_limit + 1, assured=seq.spec.assured)
