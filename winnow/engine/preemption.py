"""What gives way when pages run short.

First, sequences that allow it shrink to their `decode_floor`, those with the most entries first.
Then whole sequences wait in host memory, the youngest first; the oldest comes back first, before
any new request is let in, so each one ends. What does not fit there either is given up: its
request has to be computed anew, with its memory assured.
"""

from dataclasses import dataclass

import torch

from winnow.engine.generation_spec import GenerationSpec, promise_for, query_pages
from winnow.engine.kv_manager import KVManager
from winnow.engine.promises import Promise
from winnow.engine.query_ring import QueryRing
from winnow.engine.recompressor import Recompressor
from winnow.engine.sequence import Sequence
from winnow.errors import Preempted
from winnow.kv import LayerKV


@dataclass(frozen=True, slots=True)
class PreemptionStats:
    """Since the start: sequences shrunk to their floor, swapped out, and given up."""

    shrunk: int = 0
    swapped_out: int = 0
    given_up: int = 0


class Preemptor:
    """Belongs to the engine's thread. swap_bytes: of keys, values and positions in host memory.

    What waits is read by other threads too: `add` and `drop` need the scheduler's lock.
    """

    def __init__(self, memory: KVManager, recompressor: Recompressor, swap_bytes: int) -> None:
        self.stats = PreemptionStats()
        self.swapped: list[Sequence] = []  # the oldest first
        self.swapped_bytes = 0
        self._memory, self._pool = memory, memory.pool
        self._recompressor = recompressor
        self._swap_bytes = swap_bytes

    def shrink_one(self, running: list[Sequence]) -> bool:
        """Shrinks the sequence with the most entries of those that still can; False if none."""
        able = self._able(running)
        if not able:
            return False
        lengths = self._pool.lengths([seq.row for seq in able])  # [B, L, H_kv]
        seq = able[int(lengths.flatten(1).sum(1).argmax())]
        seq.budget = seq.spec.recompression.decode_floor
        self._recompressor.cut(seq)
        self._count(shrunk=1)
        return True

    def shrink_for(self, spec: GenerationSpec, running: list[Sequence]) -> None:
        """Shrinks sequences until the request has room; none if all together would not do."""
        promise, count = promise_for(self._pool, spec), spec.num_sequences
        if self._memory.has_room(count, promise, self._gain(running)):
            while not self._memory.has_room(count, promise) and self.shrink_one(running):
                pass

    def _able(self, running: list[Sequence]) -> list[Sequence]:
        known = self._recompressor.scaling is not None  # it is not before the worker's first step
        return [seq for seq in running if known and can_shrink(seq)]

    def _gain(self, running: list[Sequence]) -> Promise:
        """Pages that shrinking everybody would free at least."""
        gain = Promise(0, 0)
        for seq in self._able(running):
            now, floor = self._memory.promised(seq.row), seq.spec.recompression.decode_floor
            assert floor is not None
            queries = query_pages(self._pool, seq.spec)
            reach = self._pool.pages_for(seq.spec.limit_at(floor) + 1) + queries
            gain.most += max(0, now.most - reach)
            gain.sure += max(0, now.sure - self._pool.pages_for(floor) - queries)
        return gain

    def copy_out(self, seq: Sequence) -> list[LayerKV]:
        """What the sequence holds, in host memory; raises Preempted if there is no room."""
        shape = self._pool.shape
        num_entries = int(self._pool.lengths([seq.row]).sum())
        num_bytes = shape.kv_bytes(num_entries) + num_entries * torch.int32.itemsize
        num_bytes += seq.ring.nbytes if seq.ring else 0
        if self.swapped_bytes + num_bytes > self._swap_bytes:
            self._count(given_up=1)
            raise Preempted(
                f"KV memory ran short, and {num_bytes:,} bytes do not fit into swap_bytes "
                f"{self._swap_bytes:,}, of which {self.swapped_bytes:,} are taken"
            )
        layers = range(shape.num_layers)
        return [seq.read_layer(self._pool, layer_idx).to("cpu") for layer_idx in layers]

    def add(self, seq: Sequence, layers: list[LayerKV]) -> None:
        """The sequence waits from now on, and its pages are free."""
        seq.swapped, seq.waits = layers, True
        self.swapped_bytes += sum(map(_num_bytes, layers))
        self.swapped = sorted([*self.swapped, seq], key=age)
        self._memory.evict(seq.row)
        self._count(swapped_out=1)

    def swap_in_oldest(self, num_running: int) -> Sequence | None:
        """The sequence that has waited longest, with its pages back; None if they are not free.

        Besides its own, it needs a page for every head of the batch, so that it is not sent away
        again at once.
        """
        if not self.swapped or not self._readmit(self.swapped[0], num_running):
            return None
        seq = self.swapped[0]
        if seq.ring is not None:
            seq.ring = QueryRing(self._pool, seq.row, seq.spec.recompression.window_size)
        for layer in seq.swapped:
            self._pool.write_layer(seq.row, layer)
            if seq.ring is not None:
                seq.ring.seed(layer.layer_idx, layer.window_queries.to(self._pool.device))
        return seq

    def drop(self, seq: Sequence) -> None:
        """A sequence waits no more: it has its pages back, or leaves."""
        self.swapped.remove(seq)
        self.swapped_bytes -= sum(map(_num_bytes, seq.swapped))
        seq.waits = False

    def _readmit(self, seq: Sequence, num_running: int) -> bool:
        page_size = self._pool.page_size
        lengths = [length for layer in seq.swapped for length in layer.head_lengths]
        with_next_token = sum(length // page_size + 1 for length in lengths)
        with_next_token += query_pages(self._pool, seq.spec)
        spare = num_running * len(lengths)
        return self._memory.readmit(seq.row, with_next_token, spare=spare)

    def _count(self, *, shrunk: int = 0, swapped_out: int = 0, given_up: int = 0) -> None:
        stats = self.stats
        self.stats = PreemptionStats(
            stats.shrunk + shrunk, stats.swapped_out + swapped_out, stats.given_up + given_up
        )


def can_shrink(seq: Sequence) -> bool:
    """Whether the sequence has a floor below its budget, and a step behind it to score by.

    One whose memory is assured keeps its entries too.
    """
    floor = seq.spec.recompression.decode_floor
    has_step = seq.num_generated > 1  # the first token needs none
    if seq.spec.assured or floor is None or not has_step:
        return False
    return seq.budget is None or seq.budget > floor


def age(seq: Sequence) -> tuple[int, int]:
    """Sorts the oldest sequence first."""
    return seq.reservation.order, seq.sequence_idx


def _num_bytes(layer: LayerKV) -> int:
    return layer.nbytes + layer.window_queries.nbytes
