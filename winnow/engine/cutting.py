"""Running sequences cut back to their budget, and what that kept and dropped."""

from dataclasses import dataclass

from winnow.compression.recompress import recompress_layer
from winnow.engine.kv_pool import KVPool
from winnow.engine.paged_attention import PagedAttention
from winnow.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class CutCounts:
    """Since the start: sequences cut back, the entries kept of them, and dropped."""

    recompressions: int = 0
    kept_entries: int = 0
    dropped_entries: int = 0


class Cutter:
    """Cuts sequences of one pool. scaling: the attention logits' factor, known after a step."""

    def __init__(self, pool: KVPool) -> None:
        self.scaling: float | None = None
        self.counts = CutCounts()
        self._pool = pool

    def observe(self, sequences: list[Sequence], attention: PagedAttention) -> None:
        """Notes the queries of a step of `sequences`, and cuts whoever outgrew its budget."""
        self.scaling = attention.scaling
        observed = [(idx, seq, seq.ring) for idx, seq in enumerate(sequences) if seq.ring]
        if not observed:
            return
        queries = attention.stacked_queries()
        longest = self._pool.lengths([seq.row for seq in sequences]).amax((1, 2)).tolist()
        for idx, seq, ring in observed:
            ring.push(queries[:, idx])
            if longest[idx] > seq.growth_limit:
                self.cut(seq)

    def cut(self, seq: Sequence) -> None:
        """Cuts every layer to the sequence's budget, and its promise to what it can now reach."""
        assert seq.ring is not None and seq.budget is not None and self.scaling is not None
        kept = dropped = 0
        for layer_idx in range(self._pool.shape.num_layers):
            before = self._pool.read_layer(seq.row, layer_idx, seq.ring.ordered(layer_idx))
            after = recompress_layer(
                before,
                self.scaling,
                seq.spec.kernel_size,
                seq.budget,
                method=seq.spec.recompression,
                redundancy_weight=seq.spec.redundancy_weight,
            )
            self._pool.write_layer(seq.row, after)
            kept += after.num_entries
            dropped += before.num_entries - after.num_entries
        self.settle(seq)
        seq.reservation.recompressed_entries += dropped
        counts = self.counts
        self.counts = CutCounts(
            counts.recompressions + 1, counts.kept_entries + kept, counts.dropped_entries + dropped
        )

    def settle(self, seq: Sequence) -> None:
        """Lowers the sequence's promise to what it can still come to hold."""
        tokens_left = seq.spec.sampling.max_tokens - seq.num_generated
        self._pool.settle(seq.row, tokens_left, seq.growth_limit + 1, assured=seq.spec.assured)
