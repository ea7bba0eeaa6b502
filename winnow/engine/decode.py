"""The running batch: sequences join when their KV is in place, decode together, and leave.

One step is join → make room → forward → recompress → sample → emit. `step` belongs to one thread;
every other method may be called from any thread.
"""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.engine.cutting import CutCounts, Cutter
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.outputs import EngineStats, StepOutput
from winnow.engine.paged_attention import PagedAttention
from winnow.engine.relief import Relief, ReliefCounts, age, can_shrink
from winnow.engine.sequence import GenerationSpec, Reservation, Sequence
from winnow.errors import EngineFailed, Overloaded, Preempted, WinnowError
from winnow.request import SequenceState, Token, require_range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wish:
    """Somebody wants room for a request. done: called once it was made, as far as it could be."""

    spec: GenerationSpec
    done: Callable[[], object]


class DecodeEngine:
    """Continuous batching over one model and one pool of pages.

    swap_bytes: host memory for sequences that wait for pages.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        pool_config: KVPoolConfig,
        max_batch_size: int = 64,
        swap_bytes: int = 0,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.pool = KVPool(model.shape, pool_config, max_batch_size, model.device)
        self._running: list[Sequence] = []  # the oldest first
        self._arrived: list[Sequence] = []
        self._reserved: set[Reservation] = set()
        self._wishes: list[_Wish] = []
        self._taken_out: dict[Reservation, list[Sequence]] = {}
        self._num_failures = 0
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._cutter = Cutter(self.pool)
        self._relief = Relief(self.pool, self._cutter, swap_bytes)

    @property
    def cut_counts(self) -> CutCounts:
        return self._cutter.counts

    @property
    def relief_counts(self) -> ReliefCounts:
        return self._relief.counts

    # From any thread

    def reserve(self, spec: GenerationSpec) -> Reservation:
        """Promises memory and places for a request.

        Raises InvalidSetting if the request can never run here, Overloaded if it cannot now.
        """
        require_range("n", spec.num_sequences, 1, self.max_batch_size)
        require_range("prompt tokens", spec.num_prompt_tokens, 1, self.model.max_positions - 1)
        require_range("max_prompt_entries", spec.max_prompt_entries, 1, spec.num_prompt_tokens)
        spec = self._within_context(spec)
        with self._changed:
            if waiting := len(self._relief.swapped):
                raise Overloaded(f"{waiting} sequences wait for KV memory already")
            reservation = Reservation(self.pool, spec, next(self._order))
            self._reserved.add(reservation)
        return reservation

    def _within_context(self, spec: GenerationSpec) -> GenerationSpec:
        left = self.model.max_positions - spec.num_prompt_tokens
        sampling = replace(spec.sampling, max_tokens=min(spec.sampling.max_tokens, left))
        return replace(spec, sampling=sampling)

    def request_room(self, spec: GenerationSpec, done: Callable[[], object]) -> bool:
        """Has running sequences shrink until `reserve` finds pages for `spec`; False if none can.

        `done` is called from the engine's thread when they have, or can no further.
        """
        with self._changed:
            if self._relief.swapped or not any(map(can_shrink, self._running)):
                return False
            self._wishes.append(_Wish(self._within_context(spec), done))
            self._changed.notify_all()
            return True

    def start(self, reservation: Reservation, final_hidden: Tensor, next_position: int) -> None:
        """Lets a request whose layers are all written join the batch.

        final_hidden: [hidden_size], the last prompt token's.  next_position: at which decoding
        goes on, from the prefill's report.
        """
        hidden = final_hidden.to(device=self.model.device, dtype=self.model.shape.dtype)
        self._enqueue(reservation, lambda: reservation.begin(hidden, next_position))

    def resume(
        self,
        reservation: Reservation,
        states: Mapping[int, SequenceState],
        final_hidden: Tensor,
    ) -> None:
        """Lets a request join that ran at another worker, and whose layers are all written.

        states: of its sequences that have not ended, by sequence_idx.  final_hidden: as in
        `start`; it only matters to a sequence without a token.
        """
        hidden = final_hidden.to(device=self.model.device, dtype=self.model.shape.dtype)
        self._enqueue(reservation, lambda: reservation.resume(states, hidden))

    def _enqueue(
        self, reservation: Reservation, start: Callable[[], list[Sequence] | None]
    ) -> None:
        """Lets what `start` returns join; a reservation whose start fails holds nothing more."""
        sequences = None
        try:
            sequences = start()
            for seq in sequences or ():
                self._cutter.settle(seq)
        finally:
            with self._changed:
                self._reserved.discard(reservation)
                self._arrived += sequences or ()
                self._changed.notify_all()

    @contextlib.contextmanager
    def taken_out(self, reservation: Reservation, timeout_s: float) -> Iterator[list[Sequence]]:
        """The request's sequences, out of the batch and between two steps; freed in the end.

        Empty if none runs (any more).  Raises EngineFailed if the step takes longer than that.
        """
        sequences = self._take_out(reservation, timeout_s)
        try:
            yield sequences
        finally:
            self.pool.release(*(seq.row for seq in sequences))

    def _take_out(self, reservation: Reservation, timeout_s: float) -> list[Sequence]:
        with self._changed:
            reservation.moving = True
            self._changed.notify_all()

            def is_out() -> bool:
                """A request whose KV has just arrived still counts as reserved, until `start`."""
                is_in = any(seq.reservation is reservation for seq in self._everyone())
                return not is_in and reservation not in self._reserved

            try:
                if not self._changed.wait_for(is_out, timeout_s):
                    raise EngineFailed(f"the engine did no step within {timeout_s:g} s")
                return self._taken_out.pop(reservation, [])
            finally:
                reservation.moving = False  # what arrives later, nobody takes out

    def _everyone(self) -> list[Sequence]:
        return [*self._running, *self._arrived, *self._relief.swapped]

    def release(self, reservation: Reservation) -> None:
        """Ends a request wherever it is and frees its pages, at the latest before the next step.

        A device that fails at that is noted; what was promised to the request is free all the same.
        """
        try:
            freed = reservation.abandon()
        except RuntimeError:
            logger.exception("a request's pages could not be freed")
            self.note_failure()
            freed = True
        with self._changed:
            self._reserved.discard(reservation)
            reservation.cancelled = not freed
            self._changed.notify_all()

    @property
    def num_failures(self) -> int:
        """Failed steps, and KV that could not be put in place, since a forward pass succeeded."""
        return self._num_failures

    def note_failure(self) -> None:
        """Something failed that may be the device's fault."""
        with self._changed:
            self._num_failures += 1

    def wait_for_work(self, timeout_s: float) -> bool:
        """Blocks until there is something for `step` to do; False if the time passed first."""
        with self._changed:
            busy = self._changed.wait_for(
                lambda: bool(self._running or self._arrived or self._wishes), timeout_s
            )
            return busy or bool(self._relief.swapped)  # which may have room by now

    def wait_for_news(self, timeout_s: float) -> bool:
        """Blocks until `step` can do more than go on with who runs; False if the time passed."""

        def has_news() -> bool:
            return bool(self._arrived or self._wishes) or any(s.goes for s in self._everyone())

        with self._changed:
            return self._changed.wait_for(has_news, timeout_s)

    def stats(self) -> EngineStats:
        with self._changed:
            swapped = list(self._relief.swapped)
            sequences = self._running + self._arrived + swapped
            num_reserved = len(self._reserved)
        shape = self.model.shape
        entries_per_token = shape.num_layers * shape.num_kv_heads
        return EngineStats(
            pool=self.pool.stats(),
            running_sequences=len(sequences),
            reserved_requests=num_reserved,
            swapped_sequences=len(swapped),
            swapped_bytes=self._relief.swapped_bytes,
            kv_unpruned_bytes=shape.kv_bytes(
                entries_per_token * sum(seq.num_tokens for seq in sequences)
            ),
        )

    # From the engine's thread

    def step(self) -> list[StepOutput]:
        """One token for every running sequence; what each request got."""
        self._join()
        self._grant_wishes()
        given_up = self._make_room()
        batch = [seq for seq in self._running if seq not in given_up]
        return self._emit([*batch, *given_up], given_up | self._results(batch))

    def step_first(self) -> list[StepOutput]:
        """As `step`, but only sequences without a token get one, which takes no layer."""
        self._join()
        self._grant_wishes()
        batch = [seq for seq in self._running if seq.final_hidden is not None]
        return self._emit(batch, self._results(batch))

    def _results(self, batch: list[Sequence]) -> dict[Sequence, Token | WinnowError]:
        if not batch:
            return {}
        computes = any(seq.final_hidden is None for seq in batch)
        try:
            logits = self.model.logits(self._forward(batch))
        except RuntimeError as error:  # out of memory, a broken kernel: nobody's KV is sure now
            logger.exception("the forward pass failed with %d sequences", len(batch))
            self.note_failure()
            return dict.fromkeys(batch, EngineFailed(f"the forward pass failed: {error}"))
        taken: dict[Sequence, Token | WinnowError] = {
            seq: self._take(seq, row) for seq, row in zip(batch, logits, strict=True)
        }
        if computes:  # a first token takes no layer: it works where the rest fails
            with self._changed:
                self._num_failures = 0
        return taken

    def _join(self) -> None:
        """Lets arrived sequences into the batch, swapped ones back, and cancelled ones out."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            going = [seq for seq in (*self._running, *arrived, *self._relief.swapped) if seq.goes]
            arrived = [seq for seq in arrived if seq not in going]
            # Before the device is asked for anything: where it fails, nobody drops out unseen.
            staying = [seq for seq in self._running if seq not in going]
            self._running = sorted([*staying, *arrived], key=age)
            self._changed.notify_all()
            freed = []
            for seq in going:
                if seq.swapped:
                    self._relief.drop(seq)
                if seq.reservation.moving:
                    self._taken_out.setdefault(seq.reservation, []).append(seq)
                else:
                    freed.append(seq.row)
            self.pool.release(*freed)
        self._swap_in()

    def _swap_in(self) -> None:
        while (seq := self._relief.swap_in_oldest(len(self._running))) is not None:
            with self._changed:
                self._relief.drop(seq)
                seq.swapped = []
                self._running = sorted([*self._running, seq], key=age)

    def _grant_wishes(self) -> None:
        with self._changed:
            wishes, self._wishes = self._wishes, []
        for wish in wishes:
            self._relief.shrink_for(wish.spec, self._running)
            wish.done()

    def _make_room(self) -> dict[Sequence, Token | WinnowError]:
        """Frees the pages that the next token needs; the sequences given up for that, and why."""
        given_up: dict[Sequence, Token | WinnowError] = {}
        staying = list(self._running)
        while not self.pool.claim([seq.row for seq in staying if seq.final_hidden is None]):
            if self._relief.shrink_one(staying):
                continue
            youngest = [seq for seq in staying if not seq.spec.assured][-1]
            staying.remove(youngest)
            try:
                self._swap_out(youngest)
            except Preempted as error:
                given_up[youngest] = error
                self.pool.evict(youngest.row)
        return given_up

    def _swap_out(self, seq: Sequence) -> None:
        """Copies without the lock, so that nobody else waits for it."""
        layers = self._relief.copy_out(seq)
        with self._changed:
            self._running = [other for other in self._running if other is not seq]
            self._relief.add(seq, layers)

    def _forward(self, batch: list[Sequence]) -> Tensor:
        """Hidden states from which each sequence's next token is sampled: [B, hidden_size]."""
        going = [seq for seq in batch if seq.final_hidden is None]
        computed = iter(self._forward_tokens(going)) if going else iter(())
        hidden = [next(computed) if seq.final_hidden is None else seq.final_hidden for seq in batch]
        for seq in batch:
            seq.final_hidden = None
        return torch.stack(hidden)

    def _forward_tokens(self, going: list[Sequence]) -> Tensor:
        """Feeds each sequence's last token through all layers: [B, hidden_size]."""
        device = self.model.device
        tokens = torch.tensor([[seq.history.generated[-1]] for seq in going], device=device)
        positions = torch.tensor([seq.next_position - 1 for seq in going], device=device)
        attention = PagedAttention(self.pool, [seq.row for seq in going], positions)
        hidden, rope = self.model.embed(tokens), self.model.rope(positions[:, None])
        for layer_idx in range(self.model.shape.num_layers):
            hidden = self.model.layer(layer_idx, hidden, rope, attention)
        self._cutter.observe(going, attention)
        return hidden[:, 0]

    def _take(self, seq: Sequence, logits: Tensor) -> Token | EngineFailed:
        try:
            token = seq.take(logits, self.model)
        except EngineFailed as error:
            return error
        return replace(token, finish_reason=seq.finish_reason(self.model))

    def _emit(
        self, batch: list[Sequence], results: dict[Sequence, Token | WinnowError]
    ) -> list[StepOutput]:
        by_request: dict[Reservation, list[Sequence]] = {}
        for seq in batch:
            by_request.setdefault(seq.reservation, []).append(seq)
        return [
            self._output(reservation, sequences, results)
            for reservation, sequences in by_request.items()
        ]

    def _output(
        self,
        reservation: Reservation,
        sequences: list[Sequence],
        results: dict[Sequence, Token | WinnowError],
    ) -> StepOutput:
        """One request's output; sequences that ended leave the batch and free their pages."""
        outcomes = [results[seq] for seq in sequences]
        tokens = [outcome for outcome in outcomes if isinstance(outcome, Token)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, WinnowError)]
        ended = {token.sequence_idx for token in tokens if token.finish_reason}
        new = {seq.sequence_idx for seq in sequences if seq.is_new}
        leaving = [seq for seq in sequences if errors or seq.sequence_idx in ended]
        self._retire(leaving)
        reservation.num_live -= len(leaving)
        return StepOutput(
            request_id=reservation.spec.request_id,
            tokens=tuple(token for token in tokens if token.sequence_idx in new),
            recompressed_entries=reservation.recompressed_entries,
            finished=bool(errors) or not reservation.num_live,
            error=errors[0] if errors else None,
        )

    def _retire(self, ended: list[Sequence]) -> None:
        with self._changed:
            self._running = [seq for seq in self._running if seq not in ended]
            self._changed.notify_all()
        self.pool.release(*(seq.row for seq in ended))
