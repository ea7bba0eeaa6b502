"""The decode engine: continuous batching of sequences whose prompt KV is in the pool.

One thread calls `step` and `step_first`; every other method may be called from any thread.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from winnow.decoder import DecoderModel
from winnow.engine.generation_spec import GenerationSpec
from winnow.engine.kv_manager import KVManager
from winnow.engine.kv_pool import KVPool, KVPoolConfig
from winnow.engine.outputs import EngineStats, StepOutput
from winnow.engine.preemption import PreemptionStats
from winnow.engine.recompressor import RecompressionStats, Recompressor
from winnow.engine.runner import ModelRunner, StepResult
from winnow.engine.scheduler import Schedule, Scheduler
from winnow.engine.sequence import Reservation, Sequence
from winnow.errors import EngineFailed, WinnowError
from winnow.kv import SequenceState
from winnow.to_device import tensor_to_device
from winnow.tokens import Token

logger = logging.getLogger(__name__)

Outcome = Token | WinnowError


class DecodeEngine:
    """Continuous batching over one model and one pool of pages.

    swap_bytes: host memory for sequences that are swapped out.
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
        memory = KVManager(self.pool, max_batch_size, pool_config.overcommit)
        self._recompressor = Recompressor(memory)
        self._runner = ModelRunner(model, self.pool)
        self.scheduler = Scheduler(
            memory,
            self._recompressor,
            max_positions=model.max_positions,
            max_batch_size=max_batch_size,
            swap_bytes=swap_bytes,
        )
        self._num_failures = 0
        self._failing = threading.Lock()

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
        """Generate one token for every running sequence; returns one output per request."""
        return self._step(self.scheduler.schedule())

    def step_first(self) -> list[StepOutput]:
        """As `step`, but only for sequences without a token yet, which need no layer computed."""
        return self._step(self.scheduler.schedule_first())

    def _step(self, schedule: Schedule) -> list[StepOutput]:
        return self._postprocess(schedule, self._run(schedule.batch))

    def _run(self, batch: list[Sequence]) -> StepResult:
        try:
            return self._runner.run(batch)
        except RuntimeError as error:
            return self._failed(batch, error)

    def _postprocess(self, schedule: Schedule, result: StepResult) -> list[StepOutput]:
        try:
            self._recompress(result)
        except RuntimeError as error:
            result = self._failed(schedule.batch, error)
        return self._emit({**result.tokens, **schedule.preempted})

    def _recompress(self, result: StepResult) -> None:
        if result.queries is None:  # no layer was computed, so the device is not proven to work
            return
        self._recompressor.observe(result.queries)
        with self._failing:
            self._num_failures = 0

    def _failed(self, batch: list[Sequence], error: RuntimeError) -> StepResult:
        """Fail the whole batch: after a device error no sequence's KV can be trusted."""
        logger.error("the forward pass failed with %d sequences", len(batch), exc_info=error)
        self.note_failure()
        return StepResult(dict.fromkeys(batch, EngineFailed(f"the forward pass failed: {error}")))

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
        self.scheduler.retire(list(outcomes) if errors else ended)
        return StepOutput(
            request_id=reservation.spec.request_id,
            tokens=tuple(token for seq, token in tokens.items() if seq.is_new),
            recompressed_entries=reservation.recompressed_entries,
            finished=bool(errors) or reservation.ended,
            error=errors[0] if errors else None,
        )
