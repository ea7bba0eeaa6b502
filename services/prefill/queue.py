"""The prefill queue: prompts wait for the thread that runs the model.

After each layer the thread goes on with the prompt that winnow/engine/prefill_scheduler.py chooses,
so a short one does not wait until a long one ends. Prompts that are cancelled or past their
deadline end there too, whether they wait, are open or were just computed.
"""

import contextlib
import logging
import threading
import time
from concurrent.futures import Future

import torch

from services.common.cores import SharedCores
from services.common.jobs import PrefillJob, PrefillOutcome
from services.common.routing_stats import RoutingStats, short_hash
from services.common.tls import PeerTls
from services.prefill.adapters import used_adapter
from services.prefill.channels import Channels
from services.prefill.engine import PrefillEngine, cancelled, store_for
from services.prefill.metrics import PrefillMetrics
from services.prefill.transfers import Shipping, Transfers
from services.prefill.work import Work
from winnow import methods
from winnow.adapters.ref import AdapterRef
from winnow.decoder import DecoderModel
from winnow.distributed.ranks import Ranks
from winnow.engine.prefill_scheduler import PrefillScheduler
from winnow.engine.prefix.store import PrefixStore
from winnow.engine.prompt_logprobs import scoring_layer_tokens
from winnow.errors import DeadlineExceeded, Overloaded, PrefillFailed, PrefillLost, WinnowError
from winnow.kv import KvDtype

logger = logging.getLogger(__name__)


class PrefillQueue:
    """Owns the engine thread of a prefill worker, which ends with `stop`, or with the engine."""

    def __init__(
        self,
        model: DecoderModel,
        metrics: PrefillMetrics,
        *,
        max_waiting: int,
        max_open: int,
        num_threads: int,
        store: PrefixStore | None = None,
        kv_dtype: KvDtype = "auto",
        peers: PeerTls | None = None,
        cores: SharedCores | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """max_open: prompts begun and not computed to their end.

        store: used by this queue's thread alone; None: every prompt is computed whole.
        kv_dtype: how KV is sent.
        cores: those on which decode workers yield while a layer is computed.
        ranks: of the model, if their extension is PrefillRank: each sends the KV of its heads.
        """
        self._model = model
        self._max_waiting = max_waiting
        self._num_threads = num_threads
        self._channels = Channels(peers)
        self._cores = cores
        self._store = store
        shipping = None if ranks is None else Shipping(ranks, peers)
        transfers = Transfers(model, kv_dtype, shipping)
        self._engine = PrefillEngine(model, metrics, self._channels, cores, transfers, store)
        self._scheduler: PrefillScheduler[Work] = PrefillScheduler(max_open)
        self._changed = threading.Condition()
        self._works: list[Work] = []  # in order of arrival; those over are removed after each layer
        self._stopping = self._is_lost = False
        self._thread = threading.Thread(target=self._run, name="prefill-engine", daemon=True)
        metrics.waiting.set_function(lambda: len(self._waiting()))
        metrics.waiting_tokens.set_function(
            lambda: sum(len(work.job.token_ids) for work in self._waiting())
        )
        metrics.open.set_function(lambda: sum(work.is_open for work in self._left()))
        metrics.oldest_seconds.set_function(self._oldest_s)
        metrics.device_memory_bytes.set_function(lambda: model.memory_bytes)
        metrics.adapters_loaded.set_function(lambda: model.num_adapters)
        if store is not None:
            metrics.watch_store(store.stats)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Fail all waiting and open jobs, and return when the thread has ended."""
        self._take_no_more()
        self._thread.join()
        self._channels.close()
        if self._cores is not None:
            self._cores.close()

    def _take_no_more(self) -> None:
        """Fail all waiting jobs, and let the thread end, which fails the open ones."""
        with self._changed:
            self._stopping = True
            waiting = self._waiting()
            self._changed.notify_all()
        for work in waiting:
            work.settle(self._ended())

    def submit(self, job: PrefillJob) -> "Future[PrefillOutcome]":
        """The job's outcome, once its KV is in place; cancelling the future stops the work.

        Raises Overloaded if too many prompts are waiting, unless the job's request was admitted
        before, and for a job that gives way if there is any other; PrefillFailed after the end.
        """
        work = self._work(job)
        with self._changed:
            if self._stopping:
                raise self._ended()
            self._require_room(job)
            self._works.append(work)
            self._changed.notify_all()
        work.outcome.add_done_callback(lambda _: self._forget(work))
        return work.outcome

    def warm(self, adapter: AdapterRef) -> None:
        """Read an adapter, which the engine's thread would otherwise wait for.

        Raises PrefillFailed if it cannot be read here, Overloaded if there is no room for it now.
        """
        used_adapter(self._model, adapter).end_use()

    def routing_stats(self) -> RoutingStats | None:
        """What gateways route by; None without a prefix store, and after the engine's end."""
        if self._store is None or not self.alive:
            return None
        return RoutingStats(
            self._model.fingerprint,
            self._store.block_tokens,
            list(map(short_hash, self._store.held())),
            {work.job.request_id: work.tokens_left for work in self._left()},
        )

    def _work(self, job: PrefillJob) -> Work:
        num_tokens = len(job.token_ids)
        method = methods.create(job.pruning, num_tokens, self._model.shape)
        store = store_for(job, self._store)
        if store is not None and method.no_prefix_reason() is None:
            num_tokens = max(
                1, num_tokens - store.num_held(*(job.token_ids, job.cache_salt, job.kv_variant))
            )
        num_scored = 0 if job.num_prompt_logprobs is None else num_tokens - job.scored_from
        return Work(
            job,
            num_tokens,
            method.layer_tokens_left(0, num_tokens),
            scoring_layer_tokens(self._model, num_scored),
        )

    def _require_room(self, job: PrefillJob) -> None:
        if job.gives_way and any(not work.outcome.done() for work in self._left()):
            raise _given_way()
        num_waiting = sum(not work.job.gives_way for work in self._waiting())
        if num_waiting >= self._max_waiting and not job.admitted:
            raise Overloaded(
                f"{num_waiting} prompts wait for prefill; the limit is {self._max_waiting}"
            )

    def _left(self) -> list[Work]:
        """The jobs that the engine has still to compute, in order of arrival."""
        with self._changed:
            return [work for work in self._works if not work.is_over]

    def _waiting(self) -> list[Work]:
        return [work for work in self._left() if not work.is_open]

    def _oldest_s(self) -> float:
        """Seconds since the oldest prompt came that is still to be computed; 0 without any."""
        left = self._left()
        return time.monotonic() - left[0].received_s if left else 0.0

    def _forget(self, work: Work) -> None:
        """Remove a job that was cancelled while waiting, to free its place."""
        with self._changed, contextlib.suppress(ValueError):
            if not work.is_open:
                self._works.remove(work)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # some torch backends have a per-thread setting
        try:
            while not self._engine.is_broken and self._wait_for_work():
                self._end_unwanted()
                work = self._next()
                if work is not None:
                    num_tokens = work.next_layer_tokens
                    if self._engine.advance(work):
                        self._scheduler.record(work, num_tokens)
                self._remove_those_over()
        finally:
            if not self._stopping:
                logger.critical("the prefill engine has ended")
                self._is_lost = True
            self._take_no_more()
            for work in self._left():
                if work.is_open:  # the others are settled
                    self._end_at_last(work)

    def _end_at_last(self, work: Work) -> None:
        try:
            self._engine.end(work, self._ended())
        except Exception:  # of a broken device; the job has its outcome
            logger.exception("a prompt's memory is lost", extra={"request_id": work.job.request_id})

    def _ended(self) -> PrefillFailed:
        """Why no job is taken any more; one of a lost worker goes to another at no cost."""
        if self._is_lost:
            return PrefillLost("the prefill engine has ended")
        return PrefillFailed("the prefill worker stops")

    def _wait_for_work(self) -> bool:
        """Wait until there is a prompt; False if the worker stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or bool(self._works))
            return not self._stopping

    def _end_unwanted(self) -> None:
        """End what was cancelled, has to give way, or is past its deadline."""
        works = self._left()
        for work in works:
            error = _reason_to_end(work, works)
            if error is not None:
                self._engine.end(work, error)
        self._remove_those_over()

    def _next(self) -> Work | None:
        """The prompt to go on with; None if the last one has left meanwhile."""
        with self._changed:
            if not self._works:
                return None
            work = self._scheduler.choose(self._works)
            work.is_open = True
            return work

    def _remove_those_over(self) -> None:
        with self._changed:
            self._works = [work for work in self._works if not work.is_over]


def _reason_to_end(work: Work, works: list[Work]) -> WinnowError | None:
    if work.outcome.done():
        return work.error or cancelled()  # its push has failed, or nobody wants it any more
    if work.remaining_s <= 0:
        deadline = f"{work.job.deadline_s:g} s"
        return DeadlineExceeded(
            f"the prompt was not computed within {deadline}"
            if work.is_open
            else f"the prompt waited {deadline} for prefill"
        )
    others = any(other is not work and not other.outcome.done() for other in works)
    return _given_way() if work.job.gives_way and others else None


def _given_way() -> Overloaded:
    return Overloaded("the prefill worker has other prompts to compute")
