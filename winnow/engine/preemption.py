"""Preemption: freeing pages when the KV pool runs short.

First, sequences that allow it are compressed to their `decode_floor`, the one with the most entries
first. Then whole sequences are swapped out to host memory, the youngest first. The oldest is
swapped in first, before any new request is admitted, so every sequence finishes. A sequence that
does not fit into host memory is given up: its request must be recomputed, with assured memory.
"""

from dataclasses import dataclass

import torch

from winnow.engine.generation_spec import GenerationSpec, promise_for, query_pages
from winnow.engine.kv_manager import KVManager
from winnow.engine.promises import Promise
from winnow.engine.query_ring import QueryRing
from winnow.engine.recompressor import Recompressor
from winnow.engine.sequence import Sequence
from winnow.engine.windows import ENDLESS
from winnow.errors import Preempted
from winnow.kv import LayerKV


@dataclass(frozen=True, slots=True)
class PreemptionStats:
    """Totals since the start: sequences compressed to their floor, swapped out, given up."""

    shrunk: int = 0
    swapped_out: int = 0
    given_up: int = 0


class Preemptor:
    """Used by the engine's thread. swap_bytes: host memory for swapped-out sequences.

    Other threads read `swapped` and `swapped_bytes`: `add` and `drop` need the scheduler's lock.
    """

    def __init__(self, memory: KVManager, recompressor: Recompressor, swap_bytes: int) -> None:
        self.stats = PreemptionStats()
        self.swapped: list[Sequence] = []  # oldest first
        self.swapped_bytes = 0
        self._memory, self._pool = memory, memory.pool
        self._recompressor = recompressor
        self._swap_bytes = swap_bytes

    def shrink_one(self, running: list[Sequence]) -> bool:
        """Compress the sequence with the most entries to its floor; False if none can shrink."""
        able = self._able(running)
        if not able:
            return False
        lengths = self._pool.lengths([seq.row for seq in able])  # [B, L, H_kv]
        seq = able[int(lengths.sum((1, 2)).argmax())]
        seq.budget = seq.spec.recompression.decode_floor
        self._recompressor.cut([seq])
        self._count(shrunk=1)
        return True

    def shrink_for(self, spec: GenerationSpec, running: list[Sequence]) -> None:
        """Shrink sequences until the request has room; none if that would not free enough."""
        promise, count = promise_for(self._pool, spec), spec.num_sequences
        if self._memory.has_room(count, promise, self._gain(running)):
            while not self._memory.has_room(count, promise) and self.shrink_one(running):
                pass

    def _able(self, running: list[Sequence]) -> list[Sequence]:
        known = self._recompressor.options is not None  # None before the worker's first step
        return [seq for seq in running if known and can_shrink(seq)]

    def _gain(self, running: list[Sequence]) -> Promise:
        """Pages that shrinking all sequences would free at least."""
        gain = Promise(0, 0)
        for seq in self._able(running):
            now, floor = self._memory.promised(seq.row), seq.spec.recompression.decode_floor
            assert floor is not None
            queries = query_pages(self._pool, seq.spec)
            reach = self._pool.pages_for(seq.spec.limit_at(floor) + 1, ENDLESS) + queries
            gain.most += max(0, now.most - reach)
            gain.sure += max(0, now.sure - self._pool.pages_for(floor, ENDLESS) - queries)
        return gain

    def copy_out(self, seq: Sequence) -> list[LayerKV]:
        """A copy of the sequence's KV in host memory; raises Preempted if there is no room."""
        shape = self._pool.shape
        num_entries = int(self._pool.lengths([seq.row]).sum())
        num_bytes = self._pool.kv_bytes(num_entries) + num_entries * torch.int32.itemsize
        num_bytes += shape.state_bytes
        num_bytes += self._pool.num_ranks * seq.ring.nbytes if seq.ring else 0
        if self.swapped_bytes + num_bytes > self._swap_bytes:
            self._count(given_up=1)
            raise Preempted(
                f"KV memory ran short, and {num_bytes:,} bytes do not fit into swap_bytes "
                f"{self._swap_bytes:,}, of which {self.swapped_bytes:,} are taken"
            )
        layers = range(shape.num_layers)
        return [seq.read_layer(self._pool, layer_idx).to("cpu") for layer_idx in layers]

    def add(self, seq: Sequence, layers: list[LayerKV]) -> None:
        """Mark the sequence as swapped out, and free its pages."""
        seq.swapped, seq.waits = layers, True
        self.swapped_bytes += sum(map(_num_bytes, layers))
        self.swapped = sorted([*self.swapped, seq], key=age)
        self._memory.evict(seq.row)
        self._count(swapped_out=1)

    def swap_in_oldest(self, num_running: int) -> Sequence | None:
        """Swap in the oldest sequence and return it; None if there are too few free pages.

        Besides its own pages, one page per head of the running batch must be free, so that it is
        not swapped out again at once.
        """
        if not self.swapped or not self._readmit(self.swapped[0], num_running):
            return None
        seq = self.swapped[0]
        if seq.ring is not None:
            seq.ring = QueryRing(self._pool, seq.row, seq.spec.recompression.window_size)
        for layer in seq.swapped:
            own = self._pool.import_layer(seq.row, layer)
            if seq.ring is not None:
                seq.ring.seed(own.layer_idx, own.window_queries)
        return seq

    def drop(self, seq: Sequence) -> None:
        """Forget a swapped-out sequence: it has been swapped in, or leaves."""
        self.swapped.remove(seq)
        self.swapped_bytes -= sum(map(_num_bytes, seq.swapped))
        seq.waits = False

    def _readmit(self, seq: Sequence, num_running: int) -> bool:
        with_next_token = self._pool.pages_to_go_on(seq.swapped)
        with_next_token += query_pages(self._pool, seq.spec)
        spare = num_running * self._pool.pages_for(1)
        return self._memory.readmit(seq.row, with_next_token, spare=spare)

    def _count(self, *, shrunk: int = 0, swapped_out: int = 0, given_up: int = 0) -> None:
        stats = self.stats
        self.stats = PreemptionStats(
            stats.shrunk + shrunk, stats.swapped_out + swapped_out, stats.given_up + given_up
        )


def can_shrink(seq: Sequence) -> bool:
    """Whether the sequence has a floor below its budget, and has run a step that gives it queries.

    A sequence with assured memory never shrinks.
    """
    floor = seq.spec.recompression.decode_floor
    has_step = seq.num_generated > 1  # the first token needs no step
    if seq.spec.assured or floor is None or seq.ring is None or not has_step:
        return False
    return seq.budget is None or seq.budget > floor


def age(seq: Sequence) -> tuple[int, int]:
    """Sort key: the oldest sequence first."""
    return seq.reservation.order, seq.sequence_idx


def _num_bytes(layer: LayerKV) -> int:
    return layer.nbytes + layer.window_queries.nbytes
