"""The decode engine: continuous batching of sequences whose prompt KV is in the pool.

One thread calls `step` and `step_first`; every other method may be called from any thread.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_pool import SplitPool, SplitRecompressor
from winnow.distributed.split_runner import SplitRunner
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.graph import Recorder
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.outputs import EngineStats, StepOutput
from winnow.engine.preemption import PreemptionStats
from winnow.engine.recompressor import RecompressionStats, Recompressor
from winnow.engine.runner import LaunchedStep, ModelRunner
from winnow.engine.scheduler import Schedule, Scheduler
from winnow.engine.sequence import Reservation, Sequence
from winnow.engine.step_runner import StepRunner
from winnow.errors import EngineFailed, Preempted, WinnowError
from winnow.kv import SequenceState
from winnow.sampling import Sampled
from winnow.to_device import tensor_to_device
from winnow.tokens import Token

logger = logging.getLogger(__name__)

Outcome = Token | WinnowError


class DecodeEngine:
    """Continuous batching over one model and one pool of pages.

    swap_bytes: host memory for sequences that are swapped out.
    ranks: those that have the model's other heads; None: it has them all.
    new_recorder: see StepRunner; with ranks, it can be pickled.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        pool_config: KVPoolConfig,
        max_batch_size: int = 64,
        swap_bytes: int = 0,
        ranks: Ranks | None = None,
        new_recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.pool: KVPool
        if ranks is None:
            self.pool = KVPool(model.shape, pool_config, max_batch_size, model.device)
            memory = KVManager(self.pool, max_batch_size, pool_config.overcommit)
            self._recompressor = Recompressor(memory)
            steps = StepRunner(model, self.pool, max_batch_size, new_recorder)
            self._runner = ModelRunner(model, steps)
        else:
            self.pool = split = SplitPool(model, pool_config, max_batch_size, ranks)
            memory = KVManager(self.pool, max_batch_size, pool_config.overcommit)
            self._recompressor = SplitRecompressor(memory, split)
            self._runner = SplitRunner(model, split, max_batch_size, new_recorder)
        self._launched: LaunchedStep | None = None  # and unread
        self.scheduler = Scheduler(
            memory,
            self._recompressor,
            max_positions=model.max_positions,
            max_batch_size=max_batch_size,
            swap_bytes=swap_bytes,
        )
        self._num_failures = 0
        self._failing = threading.Lock()

    def close(self) -> None:
        """End its threads, and let go of recorded steps, which the ranks' group may not outlive.

        There are no more steps.
        """
        self._launched = None
        self._runner.close()

    # Called from any thread

    @property
    def recompression_stats(self) -> RecompressionStats:
        return self._recompressor.stats

    @property
    def preemption_stats(self) -> PreemptionStats:
        return self.scheduler.preemption_stats

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def reserve(self, spec: GenerationSpec) -> Reservation:
        """Reserve KV memory and batch slots for a request.

        Raises InvalidSetting if the request can never run here, Overloaded if it cannot now.
        """
        return self.scheduler.reserve(spec)

    def request_room(self, spec: GenerationSpec, done: Callable[[], object]) -> bool:
        """Ask running sequences to free pages for `spec`; False if no sequence can shrink.

        `done` is called from the engine's thread once there is room, or no more can be freed.
        """
        return self.scheduler.request_room(spec, done)

    def start(self, reservation: Reservation, final_hidden: Tensor, next_position: int) -> None:
        """Add a request whose layers are all written to the batch.

        final_hidden: [hidden_size], of the last prompt token.  next_position: position of the first
        new token, from the prefill report.
        """
        hidden = self._on_device(final_hidden)
        self.scheduler.join(reservation, lambda: reservation.begin(hidden, next_position))

    def resume(
        self,
        reservation: Reservation,
        states: Mapping[int, SequenceState],
        final_hidden: Tensor,
    ) -> None:
        """Add a migrated request, whose layers are all written, to the batch.

        states: of its unfinished sequences, by sequence_idx.  final_hidden: as in `start`; used
        only for a sequence without a token.
        """
        hidden = self._on_device(final_hidden)
        self.scheduler.join(reservation, lambda: reservation.resume(states, hidden))

    def _on_device(self, final_hidden: Tensor) -> Tensor:
        return tensor_to_device(final_hidden.to(self.model.shape.dtype), self.model.device)

    def taken_out(
        self, reservation: Reservation, timeout_s: float
    ) -> AbstractContextManager[list[Sequence]]:
        """Take the request's sequences out of the batch between two steps; freed on exit.

        Empty if none is running.  Raises EngineFailed if the current step exceeds `timeout_s`.
        """
        return self.scheduler.taken_out(reservation, timeout_s)

    def release(self, reservation: Reservation) -> None:
        """End a request in any state and free its pages, at the latest before the next step.

        A device failure here is counted; the request's reservation is freed regardless.
        """
        try:
            self.scheduler.release(reservation)
        except RuntimeError:
            logger.exception("a request's pages could not be freed")
            self.note_failure()

    @property
    def num_failures(self) -> int:
        """Failed steps and failed KV writes since the last successful forward pass."""
        return self._num_failures

    def note_failure(self) -> None:
        """Count a failure that the device may have caused."""
        with self._failing:
            self._num_failures += 1

    def wait_for_work(self, timeout_s: float) -> bool:
        """Block until there is work for `step`; False on timeout."""
        return self.scheduler.wait_for_work(timeout_s)

    def wait_for_news(self, timeout_s: float) -> bool:
        """Block until `step` has more to do than continue the running batch; False on timeout."""
        return self.scheduler.wait_for_news(timeout_s)

    # Called from the engine's thread

    def step(self) -> list[StepOutput]:
        """Generate one token for every running sequence; returns the outputs of requests.

        Where steps are recorded (winnow/engine/graph), the device begins this step while the host
        reads the last one's tokens, whose outputs are returned. Where these must be read first, no
        step begins: whoever leaves the batch must have been given its tokens before.
        """
        schedule = self.scheduler.schedule_unread() if self._launched else self.scheduler.schedule()
        return self._read() if schedule is None else self._step(schedule)

    def step_first(self) -> list[StepOutput]:
        """As `step`, but only for sequences without a token yet, which need no layer computed."""
        return self._read() or self._step(self.scheduler.schedule_first()) + self._read()

    def _step(self, schedule: Schedule) -> list[StepOutput]:
        """Launch a step, and read the one before, or both if none is to be read late."""
        try:
            batch = schedule.batch
            launched = self._runner.launch(batch, self._launched) if batch else None
        except RuntimeError as error:
            outputs = self._read()
            failed = self._failed(schedule.batch, error)
            return outputs + self._emit({**failed, **schedule.preempted})
        reads_late = self._runner.reads_late
        outputs = self._read(schedule.preempted if reads_late else None)
        if launched is not None:
            outputs += self._observe(launched)
        return outputs if reads_late else outputs + self._read(schedule.preempted)

    def _observe(self, launched: LaunchedStep) -> list[StepOutput]:
        """Recompress what the step is about to make too long; outputs only if that fails."""
        self._launched = launched
        try:
            if launched.queries is not None:
                self._recompressor.observe(launched.queries)
        except RuntimeError as error:
            self._launched = None
            return self._emit(self._failed(launched.sequences, error))
        return []

    def _read(self, preempted: Mapping[Sequence, Preempted] | None = None) -> list[StepOutput]:
        """The outputs of the launched step, if one is unread, and of those that were preempted.

        Waits for the step's tokens.
        """
        launched, self._launched = self._launched, None
        outcomes = self._outcomes(launched) if launched else {}
        return self._emit({**outcomes, **(preempted or {})})

    def _outcomes(self, launched: LaunchedStep) -> dict[Sequence, Outcome]:
        """What a step gave to its sequences that have not left meanwhile."""
        try:
            results = self._runner.read(launched)
        except RuntimeError as error:
            return self._failed(launched.sequences, error)
        if launched.queries is not None:  # otherwise the device is not proven to work
            with self._failing:
                self._num_failures = 0
        return {
            seq: seq.take(one, self.model) if isinstance(one, Sampled) else one
            for seq, one in results.items()
            if seq.is_alive
        }

    def _failed(self, batch: list[Sequence], error: RuntimeError) -> dict[Sequence, Outcome]:
        """Fail the whole batch: after a device error no sequence's KV can be trusted.

        The step that was launched before may have failed the same sequences of the same error.
        """
        alive = [seq for seq in batch if seq.is_alive]
        if alive:
            logger.error("the forward pass failed with %d sequences", len(alive), exc_info=error)
            self.note_failure()
        return dict.fromkeys(alive, EngineFailed(f"the forward pass failed: {error}"))

    def _emit(self, outcomes: Mapping[Sequence, Outcome]) -> list[StepOutput]:
        """Each request's output; finished sequences leave the batch and free their pages."""
        by_request: dict[Reservation, dict[Sequence, Outcome]] = {}
        for seq, outcome in outcomes.items():
            by_request.setdefault(seq.reservation, {})[seq] = outcome
        return [self._output(*request) for request in by_request.items()]

    def _output(self, reservation: Reservation, outcomes: Mapping[Sequence, Outcome]) -> StepOutput:
        tokens = {seq: one for seq, one in outcomes.items() if isinstance(one, Token)}
        errors = [one for one in outcomes.values() if isinstance(one, WinnowError)]
        ended = [seq for seq, token in tokens.items() if token.finish_reason]
        self.scheduler.retire(reservation.running if errors else ended)
        return StepOutput(
            request_id=reservation.spec.request_id,
            tokens=tuple(token for seq, token in tokens.items() if seq.is_new),
            recompressed_entries=reservation.recompressed_entries,
            finished=bool(errors) or reservation.ended,
            error=errors[0] if errors else None,
        )
