"""A request under harm, and what came of it."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.victim import LEASE_S, NUM_ENDLESS_TOKENS, ONE_ANSWER, Piece, Victim

# What a promise about time allows besides the lease and the replay: noticing, connecting, routing.
OVERHEAD_S = 2.0
# A machine that is shared may miss a time once; one that misses it as often as this is wrong.
MAX_TRIES = 3


@dataclass
class Asked:
    """A stream as it came.  Times are those of time.monotonic()."""

    body: Mapping[str, Any] = field(default_factory=lambda: ONE_ANSWER)
    started_s: float = field(default_factory=time.monotonic)
    harmed_s: float | None = None
    pieces: list[Piece] = field(default_factory=list)
    silence_s: float = 0.0

    def take(self, piece: Piece) -> None:
        """What had left a worker before it was harmed still comes: the longest silence counts."""
        if self.harmed_s is not None:
            last_s = self.pieces[-1].at_s if self.pieces else self.started_s
            self.silence_s = max(self.silence_s, piece.at_s - max(self.harmed_s, last_s))
        self.pieces.append(piece)

    @property
    def replay_s(self) -> float:
        """To do again what was done before the harm: the prefill, and the tokens so far."""
        assert self.harmed_s is not None
        return self.harmed_s - self.started_s

    @property
    def first_token_s(self) -> float:
        return self.pieces[0].at_s - self.started_s

    def require_whole(self, victim: Victim) -> None:
        """It is the stream of a quiet service."""
        assert "".join(piece.text for piece in self.pieces) == victim.answer(self.body)
        assert [p.finish_reason for p in self.pieces if p.finish_reason] == ["length"]


def ask(
    victim: Victim,
    after: int = 0,
    harm: Callable[[], object] | None = None,
    body: Mapping[str, Any] = ONE_ANSWER,
) -> Asked:
    """The whole stream, with harm done after so many pieces; raises what the client gets."""
    asked = Asked(body)
    for piece in victim.stream(body):
        asked.take(piece)
        if harm is not None and len(asked.pieces) == after:
            harm()
            asked.harmed_s = time.monotonic()
    return asked


@contextmanager
def broken_off(victim: Victim, within_s: float) -> Iterator[None]:
    """The block asks for ENDLESS and gives it up; `within_s` after that nobody holds anything."""
    before = victim.num_generated()
    yield
    victim.require_idle(within_s)
    assert victim.num_generated() - before < NUM_ENDLESS_TOKENS


@contextmanager
def meanwhile(harm: Callable[[], object]) -> Iterator[None]:
    """Does harm while the block runs; raises what became of it."""
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(harm)
        yield
        done.result()


@dataclass(frozen=True)
class Measured:
    """limit_s: what a lease or timeout, and a replay, take; `of` says which."""

    seconds: float
    limit_s: float
    of: str


def require_in_time(victim: Victim, what: str, measure: Callable[[], Measured]) -> None:
    """`measure` does its harm, checks the answer, and finds it at most 2 s over the limit."""
    for _ in range(MAX_TRIES):
        measured = measure()
        say(f"{what}: {measured.seconds:.2f} s; {measured.of}: {measured.limit_s:.2f} s")
        if measured.seconds <= measured.limit_s + OVERHEAD_S:
            return
        victim.restore()
    raise AssertionError(f"{what}: too late, {MAX_TRIES} times")


def require_next_token_in_time(
    victim: Victim, what: str, harm: Callable[[], object], lease_s: float = LEASE_S
) -> None:
    """The same stream, in which harm makes a pause of the lease and the replay at most.

    lease_s: 0 where the loss is noticed at once.
    """

    def measure() -> Measured:
        asked = ask(victim, 30, harm)
        asked.require_whole(victim)
        of = f"lease {lease_s:g} s + replay"
        return Measured(asked.silence_s, lease_s + asked.replay_s, of)

    require_in_time(victim, f"{what} to the next token", measure)


def require_first_token_in_time(
    victim: Victim,
    what: str,
    limit_s: float,
    before: Callable[[], None],
    harm: Callable[[], None] = lambda: None,
) -> None:
    """The same stream, whose first token is kept back by `limit_s` at most.

    By what is done before, and by the harm that is done meanwhile.
    """

    def measure() -> Measured:
        before()
        with meanwhile(harm):
            asked = ask(victim)
        asked.require_whole(victim)
        of = f"timeout {limit_s:g} s + quiet service"
        return Measured(asked.first_token_s, limit_s + victim.quiet_s, of)

    require_in_time(victim, f"{what} to the first token", measure)


def say(line: str) -> None:
    """For who runs pytest with -s."""
    sys.stdout.write(f"{line}\n")
