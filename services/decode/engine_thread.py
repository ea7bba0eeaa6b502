"""The decode engine's thread: owns the model, steps while there is work, sleeps otherwise."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from services.common.cores import SharedCores
from services.decode.metrics import PREEMPTIONS, DecodeMetrics
from winnow.engine.decode import DecodeEngine
from winnow.engine.outputs import StepOutput
from winnow.errors import EngineFailed, WinnowError

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.1  # the longest delay of a stop
# The requests of a failed step are dropped. After this many failures in a row the cause is not the
# requests: a GPU that failed once keeps failing, and memory that others took may stay unavailable.
_MAX_FAILURES = 10
_FAILURE_PAUSE_S = 0.1
_LOOK_S = 0.02  # how soon it notices that prefill has ended


class EngineThread:
    """Runs engine steps, and posts each step's outputs to the event loop in a single call.

    deliver and fail_all run on the event loop. The thread ends after `stop`, or after
    _MAX_FAILURES failures in a row. A device that cannot take KV never gets to a step, so after
    any failure an idle engine probes the device.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        metrics: DecodeMetrics,
        deliver: Callable[[list[StepOutput]], None],
        fail_all: Callable[[WinnowError], None],
        *,
        cores: SharedCores | None = None,
        num_cores: float = 1.0,
    ) -> None:
        """cores: shared with prefill, during which it uses `num_cores` of them on average."""
        self._engine = engine
        self._cores = cores
        self._num_cores = num_cores
        self._metrics = metrics
        self._deliver = deliver
        self._fail_all = fail_all
        self._loop = asyncio.get_running_loop()
        self._seen_recompressions = engine.recompression_stats
        self._seen_preemptions = engine.preemption_stats
        self._stopping = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="winnow-decode-engine")

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def wait_until_ended(self) -> None:
        """Return when the thread will do no more steps."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Stop the thread after its current step, and wait until it has ended."""
        self._stopping.set()
        await self._ended.wait()
        self._thread.join()

    def _run(self) -> None:
        engine = self._engine
        try:
            while not self._stopping.is_set() and engine.num_failures < _MAX_FAILURES:
                if engine.wait_for_work(_IDLE_WAIT_S):
                    started_s, cpu_s = time.monotonic(), time.process_time()
                    self._step(engine.step)
                    self._give_way(started_s, time.process_time() - cpu_s)
                elif engine.num_failures:
                    self._probe()
                if engine.num_failures:
                    self._stopping.wait(_FAILURE_PAUSE_S)
        finally:
            if self._cores is not None:
                self._cores.close()
            self._loop.call_soon_threadsafe(self._end)

    def _give_way(self, started_s: float, cpu_s: float) -> None:
        """Sleep while prefill runs on the same cores, so that decode uses `num_cores` on average.

        The operating system would give each half of the cores, and decode would spend its half on
        steps of the few sequences whose prompts are ready; each such step takes nearly as long as
        a step of many.
        """
        end_s = started_s + cpu_s / self._num_cores
        while self._cores is not None and self._cores.prefill_runs and not self._stopping.is_set():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            if self._engine.wait_for_news(min(left_s, _LOOK_S)):
                self._step(self._engine.step_first)

    def _end(self) -> None:
        if not self._stopping.is_set():
            logger.critical("the decode engine has ended")
            self._fail_all(EngineFailed("the decode engine has ended"))
        self._ended.set()

    def _step(self, step: Callable[[], list[StepOutput]]) -> None:
        """Run a step; if it raises, all requests fail."""
        started = time.perf_counter()
        try:
            outputs = step()
        except Exception as error:  # a failed step ends its requests, not the thread
            logger.exception("a decode step failed")
            failure = EngineFailed(f"a decode step failed: {error}")
            self._loop.call_soon_threadsafe(self._fail_all, failure)
            self._engine.note_failure()
            return
        if outputs:
            self._observe(outputs, time.perf_counter() - started)
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _probe(self) -> None:
        """Count a failed probe; a successful one proves nothing, since a step needs more."""
        try:
            self._engine.pool.probe()
        except RuntimeError:
            logger.exception("the device fails")
            self._engine.note_failure()

    def _observe(self, outputs: list[StepOutput], step_s: float) -> None:
        self._metrics.step_seconds.observe(step_s)
        self._metrics.batch_size.observe(sum(len(output.tokens) for output in outputs))
        self._observe_recompressions()
        self._observe_preemptions()

    def _observe_recompressions(self) -> None:
        stats, seen = self._engine.recompression_stats, self._seen_recompressions
        self._metrics.recompressions.inc(stats.recompressions - seen.recompressions)
        heads = self._engine.model.description.shape.total_kv_heads
        kept = stats.kept_entries - seen.kept_entries
        dropped = stats.dropped_entries - seen.dropped_entries
        self._metrics.tokens_kept.labels("decode").inc(kept / heads)
        self._metrics.tokens_dropped.labels("decode").inc(dropped / heads)
        self._seen_recompressions = stats

    def _observe_preemptions(self) -> None:
        stats, seen = self._engine.preemption_stats, self._seen_preemptions
        for how in PREEMPTIONS:
            self._metrics.preemptions.labels(how).inc(getattr(stats, how) - getattr(seen, how))
        self._seen_preemptions = stats
