"""What gives way when pages run short.

First, sequences that allow it shrink to their `decode_floor`, those with the most entries first.
Then whole sequences wait in host memory, the youngest first; the oldest comes back first, before
any new request is let in, so each one ends. What does not fit there either is given up: its
request has to be computed anew, with its memory assured.
"""

from dataclasses import dataclass

from winnow.engine.cutting import Cutter
from winnow.engine.kv_pool import KVPool
from winnow.engine.sequence import Sequence
from winnow.errors import Preempted


@dataclass(frozen=True, slots=True)
class ReliefCounts:
    """Since the start: sequences shrunk to their floor, swapped out, and given up."""

    shrunk: int = 0
    swapped_out: int = 0
    given_up: int = 0


class Relief:
    """Belongs to the engine's thread. swap_bytes: of keys, values and positions in host memory."""

    def __init__(self, pool: KVPool, cutter: Cutter, swap_bytes: int) -> None:
        self.counts = ReliefCounts()
        self.swapped: list[Sequence] = []  # the oldest first
        self.swapped_bytes = 0
        self._pool = pool
        self._cutter = cutter
        self._swap_bytes = swap_bytes

    def shrink_one(self, running: list[Sequence]) -> bool:
        """Shrinks the sequence with the most entries of those that still can; False if none."""
        able = [seq for seq in running if can_shrink(seq)]
        if not able:
            return False
        lengths = self._pool.lengths([seq.row for seq in able])  # [B, L, H_kv]
        seq = able[int(lengths.flatten(1).sum(1).argmax())]
        seq.budget = seq.spec.decode_floor
        self._cutter.cut(seq)
        self._count(shrunk=1)
        return True

    def swap_out(self, seq: Sequence) -> None:
        """Moves what the sequence holds to host memory; raises Preempted if it has no room."""
        layers = [
            self._pool.read_layer(seq.row, layer_idx).to("cpu")
            for layer_idx in range(self._pool.shape.num_layers)
        ]
        num_bytes = sum(layer.nbytes for layer in layers)
        if self.swapped_bytes + num_bytes > self._swap_bytes:
            self._count(given_up=1)
            raise Preempted(
                f"KV memory ran short, and {num_bytes:,} bytes do not fit into swap_bytes "
                f"{self._swap_bytes:,}, of which {self.swapped_bytes:,} are taken"
            )
        seq.swapped = layers
        seq.reservation.num_swapped += 1
        self.swapped_bytes += num_bytes
        self.swapped = sorted([*self.swapped, seq], key=age)
        self._pool.evict(seq.row)
        self._count(swapped_out=1)

    def swap_in(self, num_running: int) -> list[Sequence]:
        """Sequences that have their pages back.

        Besides its own, each needs a page for every head of the batch, so that it is not sent
        away again at once.
        """
        back: list[Sequence] = []
        while self.swapped and self._readmit(self.swapped[0], num_running + len(back)):
            seq = self.swapped[0]
            for layer in seq.swapped:
                self._pool.write_layer(seq.row, layer)
            self.drop(seq)
            seq.swapped = []
            back.append(seq)
        return back

    def drop(self, seq: Sequence) -> None:
        """A sequence waits no more: it has its pages back, or leaves."""
        self.swapped.remove(seq)
        self.swapped_bytes -= sum(layer.nbytes for layer in seq.swapped)
        seq.reservation.num_swapped -= 1

    def _readmit(self, seq: Sequence, num_running: int) -> bool:
        page_size = self._pool.page_size
        lengths = [length for layer in seq.swapped for length in layer.head_lengths]
        with_next_token = sum(length // page_size + 1 for length in lengths)
        spare = num_running * len(lengths)
        return self._pool.readmit(seq.row, with_next_token, spare=spare)

    def _count(self, *, shrunk: int = 0, swapped_out: int = 0, given_up: int = 0) -> None:
        counts = self.counts
        self.counts = ReliefCounts(
            counts.shrunk + shrunk, counts.swapped_out + swapped_out, counts.given_up + given_up
        )


def can_shrink(seq: Sequence) -> bool:
    """Whether the sequence has a floor below its budget, and a step behind it to score by."""
    floor = seq.spec.decode_floor
    has_step = seq.num_generated > 1  # the first token needs none
    return has_step and floor is not None and (seq.budget is None or seq.budget > floor)


def age(seq: Sequence) -> tuple[int, int]:
    """Sorts the oldest sequence first."""
    return seq.reservation.order, seq.sequence_idx
