"""Rank 0's side: it starts the other ranks, tells them what to do, and ends when one of them does.

Each follower is a process with one pipe. It reads commands without waiting, and does them one after
another, so telling never waits for computing. One that takes nothing off its pipe, or does not
answer, is given up after the time that a collective may take. What rank 0 frees it tells first, so
no follower runs out of pages that rank 0 takes for free.
"""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

from winnow.distributed.commands import Answer, Command, Failed, Load, Ready
from winnow.distributed.group import LOADING_TIMEOUT, STEP_TIMEOUT, join, leave
from winnow.distributed.heads import Split
from winnow.distributed.pipes import Pipe as PipeEnd
from winnow.distributed.pipes import limit_waiting, pack, receive, send
from winnow.errors import EngineFailed, UnusableModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

_END_TIMEOUT_S = 5.0
# If a follower cannot load its share, this process most likely fails too, with a better error.
_LOADING_GRACE_S = 10.0


class Ranks:
    """The followers of this process. Every method may be called from any thread.

    on_lost: called once, from any thread, when a follower has ended or is not in step any more. The
    ranks cannot go on then: the process should end, and `tell` raises EngineFailed.
    """

    def __init__(
        self,
        num_ranks: int,
        on_lost: Callable[[str], object],
        extension: str | None = None,
    ) -> None:
        """extension: `module:class` of what followers do besides, see follower.Extension."""
        self.num_ranks = num_ranks
        self._extension = [] if extension is None else [extension]
        self._on_news: Callable[[int, Any], object] = lambda rank, news: None
        self._on_lost = on_lost
        self._lost: str | None = None
        self._loaded = False
        self._waiting_since_s: float | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()  # one command at a time, so each follower has them in order
        self._ending = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(
            prefix="winnow-ranks-",
            ignore_cleanup_errors=True,  # two threads may remove it at once
        )
        self._pipes: list[PipeEnd] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watches: list[threading.Thread] = []

    def start(self, model: str | Path, device: str, num_threads: int, **options: Any) -> None:  # noqa: ANN401
        """Start the followers and join their group; they load the model while this process does.

        options: of `load_model`.  num_threads: of each rank.
        """
        rendezvous = str(Path(self._folder.name) / "group")
        for rank in range(1, self.num_ranks):
            self._start(rank, num_threads)
            load = Load(
                rank,
                self.num_ranks,
                rendezvous,
                num_threads,
                str(model),
                {"device": device, **options},
            )
            send(self._pipes[-1], load)
        join(Split(0, self.num_ranks), rendezvous, device)

    def _start(self, rank: int, num_threads: int) -> None:
        ours, theirs = Pipe()
        news, their_news = Pipe()
        fds = [theirs.fileno(), their_news.fileno()]
        program = "winnow.distributed.follower"
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-m", program, *map(str, fds), *self._extension],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(num_threads)},
        )
        theirs.close()
        their_news.close()
        limit_waiting(ours, LOADING_TIMEOUT)
        self._pipes.append(ours)
        self._processes.append(process)
        watch = threading.Thread(
            target=self._watch, args=(rank, process), name=f"winnow-rank-{rank}", daemon=True
        )
        listening = threading.Thread(
            target=self._listen, args=(rank, news), name=f"winnow-rank-{rank}-news", daemon=True
        )
        for thread in (watch, listening):
            self._watches.append(thread)
            thread.start()

    def wait_until_loaded(self) -> None:
        """Return when every follower has loaded its share; raises UnusableModel with its reason."""
        for rank, answer in enumerate(self._answers(), start=1):
            if isinstance(answer, Failed):
                raise UnusableModel(f"rank {rank} of {self.num_ranks}: {answer.reason}")
            assert isinstance(answer, Ready)
        for pipe in self._pipes:
            limit_waiting(pipe, STEP_TIMEOUT)
        self._loaded = True
        watch = threading.Thread(target=self._watch_waits, name="winnow-rank-waits", daemon=True)
        self._watches.append(watch)
        watch.start()

    def listen(self, on_news: Callable[[int, Any], object]) -> None:
        """From now on, call `on_news` with a follower's rank and its news, on the rank's thread."""
        self._on_news = on_news

    def _listen(self, rank: int, pipe: PipeEnd) -> None:
        with pipe:
            while True:
                try:
                    news = receive(pipe)
                except (EOFError, OSError):
                    return  # `_watch` tells of its end
                self._on_news(rank, news)

    @property
    def process_ids(self) -> list[int]:
        """Of the followers, by rank."""
        return [process.pid for process in self._processes]

    def tell(self, command: Command) -> None:
        """Give every follower the same command.  Raises EngineFailed if a rank is lost."""
        self._tell([pack(command)] * (self.num_ranks - 1))

    def tell_each(self, commands: Sequence[Command]) -> None:
        """Give each follower its command, by rank."""
        self._tell([pack(command) for command in commands])

    def ask(self, command: Command, kind: type[T]) -> list[T]:
        """Every follower's answer, which is of that kind, by rank."""
        return self._ask([pack(command)] * (self.num_ranks - 1), kind)

    def ask_each(self, commands: Sequence[Command], kind: type[T]) -> list[T]:
        """`ask` each follower by its command, by rank."""
        return self._ask([pack(command) for command in commands], kind)

    def _ask(self, packed: Sequence[memoryview], kind: type[T]) -> list[T]:
        with self._lock:
            self._send(packed)
            answers = self._answers()
        found: list[T] = [answer for answer in answers if isinstance(answer, kind)]
        assert len(found) == len(answers), f"not all of {answers} are a {kind.__name__}"
        return found

    def _tell(self, packed: Sequence[memoryview]) -> None:
        with self._lock:
            self._send(packed)

    def _send(self, packed: Sequence[memoryview]) -> None:
        self._require_whole()
        for rank, (pipe, command) in enumerate(zip(self._pipes, packed, strict=True), start=1):
            with self._reaching(rank):
                pipe.send_bytes(command)

    def _answers(self) -> list[Answer]:
        answers: list[Answer] = []
        for rank, pipe in enumerate(self._pipes, start=1):
            with self._reaching(rank):
                answers.append(receive(pipe))
        return answers

    def _require_whole(self) -> None:
        if self._lost is not None:
            raise EngineFailed(self._lost)

    @contextlib.contextmanager
    def _reaching(self, rank: int) -> Iterator[None]:
        """Around what uses a rank's pipe: one that is gone, or too slow, is given up."""
        try:
            yield
        except (EOFError, OSError) as error:
            self.give_up(f"rank {rank} of {self.num_ranks} does not answer")
            raise EngineFailed(self._lost or "the ranks are stopped") from error

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what all ranks compute together: if it fails here, the others wait for ever."""
        try:
            yield
        except BaseException as error:
            self.give_up(f"rank 0 has failed: {error}")
            raise

    @contextlib.contextmanager
    def in_time(self) -> Iterator[None]:
        """Around a wait of one thread for what all ranks compute: a rank that hangs is given up.

        Collectives have that limit of their own, but not where they are replayed.
        """
        self._waiting_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since_s = None

    def _watch_waits(self) -> None:
        limit_s = STEP_TIMEOUT.total_seconds()
        while not self._closing.wait(limit_s / 10):
            since_s = self._waiting_since_s
            if since_s is not None and time.monotonic() - since_s > limit_s:
                self.give_up(f"a step has not ended after {limit_s:g} s")

    def give_up(self, reason: str) -> None:
        """Stop working with these ranks: they are not in step any more."""
        with self._ending:
            if self._closing.is_set() or self._lost is not None:
                return
            self._lost = reason
        logger.critical("tensor parallel: %s; this worker cannot go on", reason)
        for process in self._processes:
            process.kill()
        self._folder.cleanup()  # this process may end in on_lost
        self._on_lost(reason)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._loaded:
            self._closing.wait(_LOADING_GRACE_S)
        self.give_up(f"rank {rank} of {self.num_ranks} has ended with status {code}")

    def close(self) -> None:
        """End the followers, and leave their group."""
        with self._ending:
            self._closing.set()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for watch in self._watches:
            watch.join()
        leave()
        self._folder.cleanup()
