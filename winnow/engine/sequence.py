"""A request in decode: its reservation of KV memory, the arriving KV, and its running sequences.

RESERVED ──▶ RUNNING ──▶ CANCELLED
   └────────────┴────────────┴─▶ ENDED
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from typing import TypeVar

from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.engine.generation_spec import GenerationSpec, promise_for
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool
from winnow.engine.query_ring import QueryRing
from winnow.kv import LayerKV, SequenceState
from winnow.sampling import Sampled, SamplingState
from winnow.tokens import FinishReason, Token

T = TypeVar("T")


class State(Enum):
    """State of a reservation."""

    RESERVED = auto()  # its KV is arriving
    RUNNING = auto()  # all KV is in place; the engine owns its sequences
    CANCELLED = auto()  # released while running: the engine removes it before the next step
    ENDED = auto()


class Reservation:
    """KV memory and batch rows reserved for one request, and the KV that has arrived.

    order: admission order of the request, to sort by age.
    """

    def __init__(self, memory: KVManager, spec: GenerationSpec, order: int) -> None:
        promise = promise_for(memory.pool, spec)
        self.spec = spec
        self.order = order
        self.rows = memory.reserve(spec.num_sequences, promise)
        self.num_pages = promise.most * spec.num_sequences
        self.sequences: list[Sequence] = []  # unfinished ones, once it runs
        self.recompressed_entries = 0  # over all its sequences
        self._memory, self._pool = memory, memory.pool
        self._rings: dict[int, QueryRing] = {}  # by sequence_idx; a prompt's is at 0
        self._state = State.RESERVED
        self._lock = threading.Lock()

    @property
    def cancelled(self) -> bool:
        """Whether it was released while running."""
        return self._state is State.CANCELLED

    @property
    def running(self) -> list["Sequence"]:
        """Its unfinished sequences that are not swapped out."""
        return [seq for seq in self.sequences if not seq.waits]

    @property
    def waits_for_memory(self) -> bool:
        """Whether one of its sequences is swapped out."""
        return any(seq.waits for seq in self.sequences)

    def write_layer(self, layer: LayerKV, sequence_idx: int = 0) -> None:
        """Copy a layer into pages; its buffers may be reused afterwards.

        sequence_idx: the sequence of a migrated request; 0 for a prompt.
        Does nothing if the reservation was released meanwhile.
        """
        with self._lock:
            if self._state is not State.RESERVED:
                return
            self._import_layer(layer, sequence_idx)

    def _import_layer(self, layer: LayerKV, sequence_idx: int) -> None:
        """Write a layer, and seed the sequence's ring with its window queries."""
        self._open_ring(sequence_idx)
        own = self._pool.import_layer(self.rows[sequence_idx], layer)
        self._seed_ring(own, sequence_idx)

    def _open_ring(self, sequence_idx: int) -> None:
        recompression = self.spec.recompression
        observes = recompression.observes and bool(self._pool.windows.full)
        if observes and sequence_idx not in self._rings:
            row = self.rows[sequence_idx]
            self._rings[sequence_idx] = QueryRing(self._pool, row, recompression.window_size)

    def _seed_ring(self, own: LayerKV, sequence_idx: int) -> None:
        if sequence_idx in self._rings:
            self._rings[sequence_idx].seed(own.layer_idx, own.window_queries)

    def at_row(self, act: Callable[[int], T]) -> T | None:
        """`act` with the prompt's row, which is ready to be written; None if it was released."""
        with self._lock:
            if self._state is not State.RESERVED:
                return None
            self._open_ring(0)
            return act(self.rows[0])

    def write_own_heads(self, layer: LayerKV) -> None:
        """As `write_layer`, of a layer with the heads of this process alone."""

        def write(row: int) -> None:
            self._pool.write_layer(row, layer)
            self._seed_ring(layer, 0)

        self.at_row(write)

    def reset(self) -> None:
        """Drop all KV written so far, before another attempt."""
        with self._lock:
            if self._state is State.RESERVED:
                self._rings.clear()
                for row in self.rows:
                    self._pool.clear(row)

    def begin(self, final_hidden: Tensor, next_position: int) -> list["Sequence"] | None:
        """Create the sequences from the prompt's KV; None if it was released meanwhile.

        final_hidden, next_position: as in DecodeEngine.start.
        """
        with self._starting() as starts:
            if not starts:
                return None
            for idx in range(1, self.spec.num_sequences):
                self._copy_first(idx)
            self.sequences = [
                Sequence(self, row, idx, final_hidden, next_position, self._rings.pop(idx, None))
                for idx, row in enumerate(self.rows)
            ]
            return self.sequences

    def resume(
        self, states: Mapping[int, SequenceState], final_hidden: Tensor
    ) -> list["Sequence"] | None:
        """Create migrated sequences from their KV; None if it was released meanwhile.

        states: of the unfinished sequences, by sequence_idx.
        """
        with self._starting() as starts:
            if not starts:
                return None
            self.recompressed_entries = max(s.recompressed_entries for s in states.values())
            resumed = [self._resumed(idx, state, final_hidden) for idx, state in states.items()]
            ended = [row for idx, row in enumerate(self.rows) if idx not in states]
            self.sequences, self.rows = resumed, [seq.row for seq in resumed]
            self._memory.release(*ended)
            return resumed

    def _resumed(self, idx: int, state: SequenceState, final_hidden: Tensor) -> "Sequence":
        ring = self._rings.pop(idx, None)
        seq = Sequence(self, self.rows[idx], idx, final_hidden, state.next_position, ring)
        seq.go_on(state)
        return seq

    @contextlib.contextmanager
    def _starting(self) -> Iterator[bool]:
        """Go from RESERVED to RUNNING; yields False in any other state. Freed on an error."""
        with self._lock:
            starts = self._state is State.RESERVED
            if starts:
                self._state = State.RUNNING
        try:
            yield starts
        except BaseException:
            self._state = State.ENDED
            self._memory.release(*self.rows)
            raise

    def _copy_first(self, idx: int) -> None:
        """Copy the first sequence's KV and queries to another one."""
        ring = self._rings.get(0)
        for layer_idx in range(self._pool.shape.num_layers):
            queries = ring.ordered(layer_idx) if ring else None
            layer = self._pool.export_layer(self.rows[0], layer_idx, queries)
            self._import_layer(layer, idx)

    def release(self) -> None:
        """End the request: free its reservation, or have the engine remove it if it runs."""
        with self._lock:
            if self._state is State.RUNNING:
                self._state = State.CANCELLED
            if self._state is State.RESERVED:
                self._state = State.ENDED
                self._memory.release(*self.rows)

    def end(self, sequence: "Sequence") -> None:
        """Remove a finished sequence; the request ends with the last one."""
        self.sequences = [seq for seq in self.sequences if seq is not sequence]
        sequence.ring = None  # its pages are freed next
        with self._lock:
            if not self.sequences:
                self._state = State.ENDED

    @property
    def ended(self) -> bool:
        return self._state is State.ENDED


class Sequence:
    """One running sequence.

    next_position: position of the next token in the model; below num_tokens where prefill
    recomputed the selected tokens from position 0.
    """

    def __init__(
        self,
        reservation: Reservation,
        row: int,
        sequence_idx: int,
        final_hidden: Tensor,
        next_position: int,
        ring: QueryRing | None,
    ) -> None:
        spec = reservation.spec
        self.reservation = reservation
        self.spec = spec
        self.row = row
        self.sequence_idx = sequence_idx
        self.final_hidden: Tensor | None = final_hidden  # until the first token is sampled
        self.ring = ring
        self.budget = spec.recompression.decode_budget
        self.swapped: list[LayerKV] = []  # its KV while it is swapped out to host memory
        self.waits = False  # whether it is swapped out
        self.next_position = next_position
        self.sampling = SamplingState(
            spec.sampling,
            spec.sampling.seed + sequence_idx,
            spec.num_prompt_tokens,
            spec.prompt_token_ids,
            spec.grammar.constraint(spec.sampling.stop_token_ids) if spec.grammar else None,
        )
        self._replayed = spec.replayed[sequence_idx] if spec.replayed else ()

    @property
    def is_alive(self) -> bool:
        """Whether it has neither ended nor been cancelled."""
        return self in self.reservation.sequences and not self.reservation.cancelled

    def go_on(self, state: SequenceState) -> None:
        """Continue a sequence that ran on another worker."""
        if state.token_ids:
            self.final_hidden = None
        if state.at_floor:
            self.budget = self.spec.recompression.decode_floor
        self.sampling.extend(state.token_ids)

    def state(self) -> SequenceState:
        """What another worker needs to continue, besides the KV and the query window."""
        return SequenceState(
            token_ids=tuple(self.sampling.generated),
            next_position=self.next_position,
            recompressed_entries=self.reservation.recompressed_entries,
            at_floor=self.budget != self.spec.recompression.decode_budget,
        )

    def read_layer(self, pool: KVPool, layer_idx: int) -> LayerKV:
        """A copy of its KV of the layer, with its last queries as window queries."""
        if self.swapped:
            return self.swapped[layer_idx]
        queries = self.ring.ordered(layer_idx) if self.ring else None
        return pool.export_layer(self.row, layer_idx, queries)

    @property
    def growth_limit(self) -> int:
        """Entries per head above which it is recompressed to `budget` (which may be lowered)."""
        return self.spec.limit_at(self.budget)

    def may_be_cut(self, num_entries: int) -> bool:
        """Whether it may be recompressed when its longest head has `num_entries`, or before."""
        floor = self.spec.recompression.decode_floor
        return num_entries > self.growth_limit or (floor is not None and self.budget != floor)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.spec.num_prompt_tokens + self.num_generated

    @property
    def num_generated(self) -> int:
        """Generated tokens that have been read."""
        return len(self.sampling.generated)

    @property
    def is_new(self) -> bool:
        """Whether the last token was sampled, not replayed."""
        return self.num_generated > len(self._replayed)

    @property
    def next_replayed(self) -> int | None:
        """The next token if it is replayed; None if it is to be sampled."""
        at = self.sampling.num_drawn
        return self._replayed[at] if at < len(self._replayed) else None

    @property
    def newest_token(self) -> int | None:
        """The last token; None if it is unread."""
        if not self.sampling.num_unread:
            return self.sampling.generated[-1]
        last = self.sampling.num_drawn - 1
        return self._replayed[last] if last < len(self._replayed) else None

    @property
    def newest_position(self) -> int:
        """The position of the last token in the model."""
        return self.next_position + self.sampling.num_unread - 1

    def ends_unread(self, max_positions: int) -> bool:
        """Whether it ends with a token that is unread, whatever that is."""
        drawn = self.sampling.num_drawn
        at_limit = drawn >= self.spec.sampling.max_tokens
        is_full = self.spec.num_prompt_tokens + drawn >= max_positions
        return bool(self.sampling.num_unread) and (at_limit or is_full)

    def take(self, sampled: Sampled, model: DecoderModel) -> Token:
        """Append the next token, which was unread."""
        self.sampling.num_unread -= 1
        self.sampling.extend((sampled.token_id,))
        self.next_position += 1
        reason = self._finish_reason(model)
        return Token(self.sequence_idx, sampled.token_id, sampled.logprobs, reason)

    def _finish_reason(self, model: DecoderModel) -> FinishReason | None:
        """Why the sequence ends with its last token; None if it goes on."""
        sampling = self.spec.sampling
        if self.sampling.generated[-1] in sampling.ends(model.eos_token_ids):
            return FinishReason.STOP
        at_limit = self.num_generated >= sampling.max_tokens
        if at_limit or self.num_tokens >= model.max_positions:
            return FinishReason.LENGTH
        return None
