"""One admitted request: shared by its Generate call (event loop) and Push calls (threads).

waiting ── begin_attempt ──▶ receiving ── arrive ──▶ running ──▶ closed
▲                            │                       └─ given_away ─▲
└────── drop_attempt ────────┘                      (close: from anywhere)
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from torch import Tensor

from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.outputs import StepOutput
from winnow.engine.sequence import Sequence
from winnow.errors import EngineFailed, StaleAttempt, UnknownReservation, WinnowError
from winnow.kv import LayerKV, SequenceState
from winnow.model_files import ModelDescription
from winnow.report import PrefillReport
from winnow.wire import Expected, Grant, Trailer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STEP_TIMEOUT_S = 10.0  # enough for a step of a large batch, with its recompressions


@dataclass(frozen=True, slots=True)
class KVArrived:
    """All KV of an attempt is in place; decode steps follow."""

    attempt: int
    report: PrefillReport


class Move(Enum):
    """Stages of migrating a request to another worker."""

    DUE = auto()  # the worker drains; the request should move
    BEGUN = auto()  # this worker generates no more tokens for it
    OVER = auto()  # the request has left, or was lost in transfer


Event = KVArrived | StepOutput | WinnowError | Move


class ActiveRequest:
    """Holds a reservation until it is closed; only the newest attempt may write into it.

    `events` is read by the Generate call. Its size is bounded by the request: at most one event per
    generated token and sequence.
    """

    def __init__(self, engine: DecodeEngine, spec: GenerationSpec, grant: Grant) -> None:
        self.spec = spec
        self.grant = grant
        self.report: PrefillReport  # set once all KV is in place
        self.reservation = engine.reserve(spec)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._attempt = 0
        self._arrived = False
        self._closed = False
        self._cancel_transfer: Callable[[], object] | None = None
        self._last_sign_s = time.monotonic()

    def begin_attempt(self, attempt: int, cancel_transfer: Callable[[], object]) -> None:
        """Let an attempt write; drop what older ones wrote, and cancel their transfer.

        Raises StaleAttempt unless the attempt is the newest, UnknownReservation after `close`.
        """
        superseded: Callable[[], object] | None = None
        try:
            with self._lock:
                self._require_open()
                if attempt <= self._attempt:
                    raise StaleAttempt(f"attempt {attempt} came after attempt {self._attempt}")
                self._attempt = attempt
                superseded, self._cancel_transfer = self._cancel_transfer, cancel_transfer
                with self._failure_told():
                    self.reservation.reset()
                self._last_sign_s = time.monotonic()
        finally:
            if superseded is not None:
                superseded()

    def expected(self, model: ModelDescription, *, running: bool = False) -> Expected:
        """What a transfer may contain: prefill's KV, or with `running` a running sequence's."""
        spec = self.reservation.spec
        return Expected(
            grant=self.grant,
            fingerprint=spec.fingerprint_of(model),
            shape=model.shape,
            num_prompt_tokens=spec.num_prompt_tokens,
            max_entries=spec.max_entries if running else spec.max_prompt_entries,
            max_window=spec.recompression.window_size,
            max_generated=spec.sampling.max_tokens if running else None,
            max_in_windows=spec.all_entries if running else None,
        )

    def write_layer(self, attempt: int, layer: LayerKV, sequence_idx: int = 0) -> None:
        """Copy a layer into the reservation's pages.  Raises as `begin_attempt` does."""
        with self._writing(attempt):
            self.reservation.write_layer(layer, sequence_idx)

    def write_own_heads(self, attempt: int, layer: LayerKV) -> None:
        """As `write_layer`, of a layer with the heads of this process alone."""
        with self._writing(attempt):
            self.reservation.write_own_heads(layer)

    def at_row(self, attempt: int, act: Callable[[int], T]) -> T | None:
        """As Reservation.at_row.  Raises as `begin_attempt` does."""
        with self._writing(attempt):
            return self.reservation.at_row(act)

    @contextlib.contextmanager
    def _writing(self, attempt: int) -> Iterator[None]:
        with self._lock:
            self._require_newest(attempt)
            with self._failure_told():
                yield
            self._last_sign_s = time.monotonic()

    def arrive(self, attempt: int, trailer: Trailer) -> None:
        """Add the request, now fully written, to the batch.  Raises as `begin_attempt` does."""
        self._note_arrival(attempt, trailer.report)
        position = trailer.report.next_position
        with self._failure_told():
            self._engine.start(self.reservation, trailer.final_hidden, position)

    def arrive_running(
        self,
        attempt: int,
        report: PrefillReport,
        states: Mapping[int, SequenceState],
        final_hidden: Tensor,
    ) -> None:
        """`arrive` for a request that ran on another worker; states: as in DecodeEngine.resume."""
        self._note_arrival(attempt, report)
        with self._failure_told():
            self._engine.resume(self.reservation, states, final_hidden)

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        """Treat an error in the block (out of memory, a broken GPU) as an engine failure.

        It is posted to the Generate call at once, which would otherwise wait until the lease ends.
        The transfer ends with the error itself, so `close` need not cancel it.
        """
        try:
            yield
        except Exception as error:
            about = {"request_id": self.spec.request_id}
            logger.exception("KV could not be put in place", extra=about)
            self._engine.note_failure()
            failure = EngineFailed(f"KV could not be put in place: {error}")
            self._cancel_transfer = None
            self.post(failure)
            raise failure from error

    def _note_arrival(self, attempt: int, report: PrefillReport) -> None:
        with self._lock:
            self._require_newest(attempt)
            self.report = report
            self._arrived = True
            self._cancel_transfer = None
        self.post(KVArrived(attempt, report))  # before any step can post its output

    def should_move(self) -> None:
        """Ask the reader of `events` to move the request, if all its KV is in place."""
        if self._arrived:
            self.post(Move.DUE)

    @contextlib.contextmanager
    def given_away(self) -> Iterator[list[Sequence]]:
        """Take its sequences out of the batch to send them away; frees their pages at the end.

        Raises UnknownReservation if none runs, EngineFailed if the engine does not release them.
        """
        nothing = UnknownReservation(f"no sequence of request {self.spec.request_id} runs")
        if not self._arrived:
            raise nothing
        with self._engine.taken_out(self.reservation, _STEP_TIMEOUT_S) as sequences:
            if not sequences:
                raise nothing
            self.post(Move.BEGUN)
            try:
                yield sequences
            finally:
                self.post(Move.OVER)

    def drop_attempt(self, attempt: int) -> None:
        """After a failed transfer, free its pages for the next attempt. No-op for an older one."""
        with self._lock:
            if attempt == self._attempt and not self._arrived and not self._closed:
                self._cancel_transfer = None
                with self._failure_told():
                    self.reservation.reset()

    @property
    def last_sign_s(self) -> float:
        """When KV last arrived, as time.monotonic()."""
        return self._last_sign_s

    def lease_left_s(self, lease_s: float) -> float:
        """Seconds until no KV has arrived for `lease_s`; infinite once all KV is in place."""
        if self._arrived:
            return float("inf")
        return self._last_sign_s + lease_s - time.monotonic()

    def close(self) -> None:
        """Free everything, in any state; waits at most for the copy of one layer."""
        with self._lock:
            self._closed = True
            cancel, self._cancel_transfer = self._cancel_transfer, None
        self._engine.release(self.reservation)
        if cancel is not None:
            cancel()

    def post(self, event: Event) -> None:
        """Send an event to the Generate call, from any thread."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def _require_open(self) -> None:
        if self._closed:
            raise UnknownReservation(f"request {self.spec.request_id} has ended")
        if self._arrived:
            raise StaleAttempt(f"the KV of attempt {self._attempt} is already in place")

    def _require_newest(self, attempt: int) -> None:
        self._require_open()
        if attempt != self._attempt:
            raise StaleAttempt(f"attempt {attempt} was replaced by attempt {self._attempt}")
