"""Threads that compile grammars: few, with large stacks, and within a time."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from winnow.errors import InvalidGrammar, Overloaded

TIMEOUT_S = 2.0
MAX_WAITING = 8
_NUM_THREADS = 2
_MOST_OF_IT = 0.5  # of TIMEOUT_S; a job at work for longer is slow itself, not behind others
_END_S = 0.2  # for threads without a job to end in
# llguidance reads grammars recursively, and a stack overflow ends the process. The longest grammars
# need 128 MiB of stack, which is no memory until it is used.
_STACK_BYTES = 512 << 20
_stack_size = threading.Lock()  # threading.stack_size is one for all threads

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is wrong with a grammar. Kept in place of an error, whose traceback would grow."""

    error: type[InvalidGrammar]
    message: str
    param: str | None = None

    def raised(self) -> InvalidGrammar:
        return self.error(self.message, param=self.param)


class TooSlow(InvalidGrammar):
    """It takes too much time to compile."""


class Job(Generic[_T]):
    """One grammar that is being compiled, or has been."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._future: Future[_T | Refusal] = Future()
        self._begun_s: float | None = None

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def run(self) -> None:
        """Do the work; what takes too much computing is refused, also if it is done at last."""
        self._begun_s, cpu_s = time.monotonic(), time.thread_time()
        outcome: _T | Refusal
        try:
            outcome = self._work()
        except InvalidGrammar as error:
            outcome = Refusal(InvalidGrammar, error.message, error.param)
        except Exception as error:
            self._future.set_exception(error)
            return
        except BaseException as panic:  # of llguidance, which is in Rust
            outcome = Refusal(InvalidGrammar, f"cannot be compiled: {panic}")
        if time.thread_time() - cpu_s > TIMEOUT_S:
            outcome = _too_slow()
        self._future.set_result(outcome)

    def cancel(self) -> None:
        """Give a job up that has not begun."""
        self._future.set_exception(Overloaded("the service ends"))

    def result(self, end_s: float) -> _T:
        """The work's result, or its error.

        end_s: of time.monotonic().  Raises Overloaded if there is none by then, InvalidGrammar if
        it has been at work for TIMEOUT_S.
        """
        if self._begun_s is not None:
            end_s = min(end_s, self._begun_s + TIMEOUT_S)
        try:
            outcome = self._future.result(max(0.0, end_s - time.monotonic()))
        except TimeoutError:
            raise self._late() from None
        if isinstance(outcome, Refusal):
            raise outcome.raised()
        return outcome

    def _late(self) -> InvalidGrammar | Overloaded:
        begun_s = self._begun_s
        if begun_s is not None and time.monotonic() - begun_s >= _MOST_OF_IT * TIMEOUT_S:
            return _too_slow().raised()
        return Overloaded("other grammars take too long to compile")


def _too_slow() -> Refusal:
    return Refusal(TooSlow, f"takes longer than {TIMEOUT_S:g} s to compile")


class CompileThreads:
    """Runs jobs in two threads, which begin with the first jobs and end at `close`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_open = 0
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], _T], *, max_waiting: int = MAX_WAITING) -> Job[_T]:
        """Begin a job, or raise Overloaded if `max_waiting` are waiting already."""
        job = Job(work)
        with self._lock:
            if self._num_open >= max_waiting + _NUM_THREADS:
                raise Overloaded(f"{max_waiting} grammars are waiting to be compiled")
            self._num_open += 1
            if len(self._threads) < min(self._num_open, _NUM_THREADS):
                self._threads.append(self._begun())
        self._queue.put(job)
        return job

    def close(self) -> None:
        """End the threads. One that is at work ends after it, or with the process."""
        self._cancel_waiting()
        for _ in self._threads:
            self._queue.put(None)
        end_s = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _cancel_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while (job := self._queue.get_nowait()) is not None:
                job.cancel()

    def _begun(self) -> threading.Thread:
        # Nothing can interrupt llguidance: a thread that is no daemon would keep the process.
        thread = threading.Thread(target=self._run, name="winnow-grammar", daemon=True)
        with _stack_size:
            usual = threading.stack_size(_STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(usual)
        return thread

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()
            with self._lock:
                self._num_open -= 1
            del job
