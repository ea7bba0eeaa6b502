"""The scheduler: admits, swaps in, preempts and retires sequences between decode steps.

The engine's thread calls `schedule`, `schedule_unread`, `schedule_first` and `retire`; every other
method may be called from any thread.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from winnow.checks import require_range
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.kv_manager import KVManager
from winnow.engine.outputs import EngineStats
from winnow.engine.preemption import PreemptionStats, Preemptor, age, can_shrink
from winnow.engine.recompressor import Recompressor
from winnow.engine.sequence import Reservation, Sequence
from winnow.errors import EngineFailed, Overloaded, Preempted


@dataclass(frozen=True, slots=True)
class Schedule:
    """The batch of one step. preempted: sequences given up because memory ran short."""

    batch: list[Sequence] = field(default_factory=list)
    preempted: dict[Sequence, Preempted] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _RoomRequest:
    """A request to shrink sequences for `spec`. done: called afterwards, room or not."""

    spec: GenerationSpec
    done: Callable[[], object]


class Scheduler:
    """max_positions: of the model.  swap_bytes: host memory for sequences that are swapped out."""

    def __init__(
        self,
        memory: KVManager,
        recompressor: Recompressor,
        *,
        max_positions: int,
        max_batch_size: int,
        swap_bytes: int,
    ) -> None:
        self._memory = memory
        self._recompressor = recompressor
        self._preemptor = Preemptor(memory, recompressor, swap_bytes)
        self._max_positions = max_positions
        self._max_batch_size = max_batch_size
        self._running: list[Sequence] = []  # oldest first
        self._arrived: list[Sequence] = []
        self._reserved: set[Reservation] = set()
        self._room_requests: list[_RoomRequest] = []
        self._taken_out: dict[Reservation, list[Sequence]] = {}
        self._order = itertools.count()
        self._changed = threading.Condition()

    # Called from any thread

    @property
    def preemption_stats(self) -> PreemptionStats:
        return self._preemptor.stats

    def reserve(self, spec: GenerationSpec) -> Reservation:
        """See DecodeEngine.reserve."""
        require_range("n", spec.num_sequences, 1, self._max_batch_size)
        require_range("prompt tokens", spec.num_prompt_tokens, 1, self._max_positions - 1)
        require_range("max_prompt_entries", spec.max_prompt_entries, 1, spec.num_prompt_tokens)
        spec = self._within_context(spec)
        with self._changed:
            if waiting := len(self._preemptor.swapped):
                raise Overloaded(f"{waiting} sequences wait for KV memory already")
            reservation = Reservation(self._memory, spec, next(self._order))
            self._reserved.add(reservation)
        return reservation

    def _within_context(self, spec: GenerationSpec) -> GenerationSpec:
        left = self._max_positions - spec.num_prompt_tokens
        sampling = replace(spec.sampling, max_tokens=min(spec.sampling.max_tokens, left))
        return replace(spec, sampling=sampling)

    def request_room(self, spec: GenerationSpec, done: Callable[[], object]) -> bool:
        """See DecodeEngine.request_room."""
        with self._changed:
            if self._preemptor.swapped or not any(map(can_shrink, self._running)):
                return False
            self._room_requests.append(_RoomRequest(self._within_context(spec), done))
            self._changed.notify_all()
            return True

    def join(self, reservation: Reservation, start: Callable[[], list[Sequence] | None]) -> None:
        """Add the sequences that `start` returns; the reservation is over even if it fails."""
        sequences = None
        try:
            sequences = start()
            for seq in sequences or ():
                self._recompressor.settle(seq)
        finally:
            with self._changed:
                self._reserved.discard(reservation)
                self._arrived += sequences or ()
                self._changed.notify_all()

    def release(self, reservation: Reservation) -> None:
        """See DecodeEngine.release; raises RuntimeError if the device fails."""
        try:
            reservation.release()
        finally:
            with self._changed:
                self._reserved.discard(reservation)
                self._changed.notify_all()

    @contextlib.contextmanager
    def taken_out(self, reservation: Reservation, timeout_s: float) -> Iterator[list[Sequence]]:
        """See DecodeEngine.taken_out."""
        sequences = self._take_out(reservation, timeout_s)
        try:
            yield sequences
        finally:
            self._let_go(sequences)

    def _take_out(self, reservation: Reservation, timeout_s: float) -> list[Sequence]:
        with self._changed:
            self._taken_out.setdefault(reservation, [])
            self._changed.notify_all()

            def is_out() -> bool:
                """A request whose KV has just arrived still counts as reserved, until `join`."""
                is_in = any(seq.reservation is reservation for seq in self._everyone())
                return not is_in and reservation not in self._reserved

            all_out = self._changed.wait_for(is_out, timeout_s)
            taken = self._taken_out.pop(reservation, [])  # sequences that arrive later stay
        if not all_out:
            self._let_go(taken)
            raise EngineFailed(f"the engine did no step within {timeout_s:g} s")
        return taken

    def is_moving(self, reservation: Reservation) -> bool:
        """Whether `taken_out` is waiting for the request to leave the batch."""
        return reservation in self._taken_out

    def _everyone(self) -> list[Sequence]:
        return [*self._running, *self._arrived, *self._preemptor.swapped]

    def wait_for_work(self, timeout_s: float) -> bool:
        """See DecodeEngine.wait_for_work."""
        with self._changed:
            busy = self._changed.wait_for(
                lambda: bool(self._running or self._arrived or self._room_requests), timeout_s
            )
            return busy or bool(self._preemptor.swapped)  # may have room by now

    def wait_for_news(self, timeout_s: float) -> bool:
        """See DecodeEngine.wait_for_news."""

        def has_news() -> bool:
            comes = bool(self._arrived or self._room_requests)
            return comes or any(map(self._goes, self._everyone()))

        with self._changed:
            return self._changed.wait_for(has_news, timeout_s)

    def stats(self) -> EngineStats:
        with self._changed:
            swapped = list(self._preemptor.swapped)
            sequences = self._running + self._arrived + swapped
            num_reserved = len(self._reserved)
        pool = self._memory.pool
        unpruned = sum(pool.shape.unpruned_entries(seq.num_tokens) for seq in sequences)
        return EngineStats(
            pool=self._memory.stats(),
            running_sequences=len(sequences),
            reserved_requests=num_reserved,
            swapped_sequences=len(swapped),
            swapped_bytes=self._preemptor.swapped_bytes,
            kv_unpruned_bytes=pool.num_ranks * pool.kv_bytes(unpruned),
        )

    # Called from the engine's thread

    def schedule(self) -> Schedule:
        """The next step's batch, its pages set aside; preempts sequences if pages run short."""
        self._let_in()
        preempted = self._make_room()
        return Schedule([seq for seq in self._running if seq not in preempted], preempted)

    def schedule_unread(self) -> Schedule | None:
        """As `schedule`, while the last step's tokens are unread; sequences that join come along.

        Returns None where these tokens must be read first: a sequence leaves, waits or would have
        to give way, or needs them to go on.
        """
        with self._changed:
            everyone = self._everyone()
            if self._room_requests or self._preemptor.swapped or any(map(self._goes, everyone)):
                return None
            self._running, self._arrived = sorted(everyone, key=age), []
        batch = [seq for seq in self._running if not seq.ends_unread(self._max_positions)]
        if not all(seq.sampling.can_draw_unread for seq in batch):
            return None
        return Schedule(batch) if self._claim(batch) else None

    def schedule_first(self) -> Schedule:
        """As `schedule`, but only sequences that have no token yet; they need no pages."""
        self._let_in()
        return Schedule([seq for seq in self._running if seq.final_hidden is not None])

    def _let_in(self) -> None:
        self._join_and_leave()
        self._swap_in()
        self._answer_room_requests()

    def retire(self, sequences: list[Sequence]) -> None:
        """Remove finished sequences from the batch, and free their rows and pages."""
        with self._changed:
            self._running = [seq for seq in self._running if seq not in sequences]
            self._changed.notify_all()
        self._let_go(sequences)

    def _let_go(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            seq.reservation.end(seq)
        self._memory.release(*(seq.row for seq in sequences))

    def _join_and_leave(self) -> None:
        """Add arrived sequences to the batch; remove those cancelled or migrating."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            everyone = [*self._running, *arrived, *self._preemptor.swapped]
            going = [seq for seq in everyone if self._goes(seq)]
            arrived = [seq for seq in arrived if seq not in going]
            # Before any call to the device: if one fails, no sequence is lost.
            staying = [seq for seq in self._running if seq not in going]
            self._running = sorted([*staying, *arrived], key=age)
            self._changed.notify_all()
            freed = []
            for seq in going:
                if seq.waits:
                    self._preemptor.drop(seq)
                if seq.reservation in self._taken_out:
                    self._taken_out[seq.reservation].append(seq)
                else:
                    freed.append(seq)
            self._let_go(freed)

    def _goes(self, seq: Sequence) -> bool:
        return seq.reservation.cancelled or seq.reservation in self._taken_out

    def _swap_in(self) -> None:
        while (seq := self._preemptor.swap_in_oldest(len(self._running))) is not None:
            with self._changed:
                self._preemptor.drop(seq)
                seq.swapped = []
                self._running = sorted([*self._running, seq], key=age)

    def _answer_room_requests(self) -> None:
        with self._changed:
            requests, self._room_requests = self._room_requests, []
        for request in requests:
            self._preemptor.shrink_for(request.spec, self._running)
            request.done()

    def _make_room(self) -> dict[Sequence, Preempted]:
        """Free the pages that the next step needs; returns the sequences given up for that."""
        given_up: dict[Sequence, Preempted] = {}
        staying = list(self._running)
        while not self._claim(staying):
            if self._preemptor.shrink_one(staying):
                continue
            youngest = [seq for seq in staying if not seq.spec.assured][-1]
            staying.remove(youngest)
            try:
                self._swap_out(youngest)
            except Preempted as error:
                given_up[youngest] = error
                self._memory.evict(youngest.row)
        return given_up

    def _claim(self, batch: list[Sequence]) -> bool:
        """Set aside the pages that a step of the batch takes; False if there are too few."""
        return self._memory.claim([seq.row for seq in batch if seq.final_hidden is None])

    def _swap_out(self, seq: Sequence) -> None:
        """Swap a sequence out; copies without the lock, so that no other thread waits."""
        layers = self._preemptor.copy_out(seq)
        with self._changed:
            self._running = [other for other in self._running if other is not seq]
            self._preemptor.add(seq, layers)
