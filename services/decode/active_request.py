"""One admitted request, between its Generate call on the event loop and Push calls on threads.

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

from torch import Tensor

from winnow.engine.decode import DecodeEngine
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.outputs import StepOutput
from winnow.engine.sequence import Sequence
from winnow.errors import EngineFailed, StaleAttempt, UnknownReservation, WinnowError
from winnow.kv import LayerKV, ModelShape, SequenceState
from winnow.report import PrefillReport
from winnow.wire import Expected, Grant, Trailer

logger = logging.getLogger(__name__)

_STEP_TIMEOUT_S = 10.0  # a step of a large batch, and what it recompresses


@dataclass(frozen=True, slots=True)
class KVArrived:
    """All KV of an attempt is in place; steps follow."""

    attempt: int
    report: PrefillReport


class Move(Enum):
    """Stages of a request's way to another worker."""

    DUE = auto()  # the worker drains
    BEGUN = auto()  # no more tokens from here
    OVER = auto()  # it has left, or got lost on the way


Event = KVArrived | StepOutput | WinnowError | Move


class ActiveRequest:
    """Holds a reservation until it is closed; only the newest attempt may write into it.

    `events` is read by the Generate call. It is bounded by what was asked for: one event per
    generated token and sequence at most.
    """

    def __init__(self, engine: DecodeEngine, spec: GenerationSpec, grant: Grant) -> None:
        self.spec = spec
        self.grant = grant
        self.report: PrefillReport  # once all KV is in place
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
        """Lets an attempt write; what older ones wrote is dropped, and their transfer cancelled.

        Raises StaleAttempt unless the attempt is the newest, UnknownReservation after `close`.
        """
        with self._lock:
            self._require_open()
            if attempt <= self._attempt:
                raise StaleAttempt(f"attempt {attempt} came after attempt {self._attempt}")
            self._attempt = attempt
            superseded, self._cancel_transfer = self._cancel_transfer, cancel_transfer
            with self._failure_told():
                self.reservation.reset()
            self._last_sign_s = time.monotonic()
        if superseded is not None:
            superseded()

    def expected(self, fingerprint: str, shape: ModelShape, *, running: bool = False) -> Expected:
        """What a transfer for it may contain: prefill's KV, or that of a running sequence."""
        spec = self.reservation.spec
        return Expected(
            grant=self.grant,
            fingerprint=fingerprint,
            shape=shape,
            num_prompt_tokens=spec.num_prompt_tokens,
            max_entries=spec.max_entries if running else spec.max_prompt_entries,
            max_window=spec.recompression.window_size,
            max_generated=spec.sampling.max_tokens if running else None,
        )

    def write_layer(self, attempt: int, layer: LayerKV, sequence_idx: int = 0) -> None:
        """Copies a layer into the reservation's pages; raises as `begin_attempt` does."""
        with self._lock:
            self._require_newest(attempt)
            with self._failure_told():
                self.reservation.write_layer(layer, sequence_idx)
            self._last_sign_s = time.monotonic()

    def arrive(self, attempt: int, trailer: Trailer) -> None:
        """Everything is written: the request joins the batch; raises as `begin_attempt` does."""
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
        """As `arrive`, for a request that ran at another worker; states: as DecodeEngine.resume."""
        self._note_arrival(attempt, report)
        with self._failure_told():
            self._engine.resume(self.reservation, states, final_hidden)

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        """What breaks here (out of memory, a broken GPU) breaks the engine.

        Whoever reads the tokens learns it at once, instead of waiting for KV until the lease ends.
        """
        try:
            yield
        except Exception as error:
            about = {"request_id": self.spec.request_id}
            logger.exception("KV could not be put in place", extra=about)
            self._engine.note_failure()
            failure = EngineFailed(f"KV could not be put in place: {error}")
            self.post(failure)
            raise failure from error

    def _note_arrival(self, attempt: int, report: PrefillReport) -> None:
        with self._lock:
            self._require_newest(attempt)
            self.report = report
            self._arrived = True
            self._cancel_transfer = None
        self.post(KVArrived(attempt, report))  # before any step can post

    def should_move(self) -> None:
        """Says so to whoever reads the tokens, if there are any to come."""
        if self._arrived:
            self.post(Move.DUE)

    @contextlib.contextmanager
    def given_away(self) -> Iterator[list[Sequence]]:
        """Its sequences, which do no more steps here; their pages are freed in the end.

        Raises UnknownReservation if none runs, EngineFailed if the engine does not let go.
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
        """A transfer failed; its pages are free for the next attempt. No-op for an older one."""
        with self._lock:
            if attempt == self._attempt and not self._arrived and not self._closed:
                self._cancel_transfer = None
                with self._failure_told():
                    self.reservation.reset()

    @property
    def last_sign_s(self) -> float:
        """When KV last arrived; time.monotonic()."""
        return self._last_sign_s

    def lease_left_s(self, lease_s: float) -> float:
        """Seconds until the request has seen no KV for `lease_s`; endless once all has arrived."""
        if self._arrived:
            return float("inf")
        return self._last_sign_s + lease_s - time.monotonic()

    def close(self) -> None:
        """Frees everything, wherever the request is; waits at most for one layer's copy."""
        with self._lock:
            self._closed = True
            cancel, self._cancel_transfer = self._cancel_transfer, None
        self._engine.release(self.reservation)
        if cancel is not None:
            cancel()

    def post(self, event: Event) -> None:
        """Hands an event to the Generate call, from any thread."""
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
