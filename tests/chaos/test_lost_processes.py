"""Processes are killed and stopped under a request; the client gets the answer all the same."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from tests.chaos.victim import LEASE_S, NUM_TOKENS, Piece, Victim

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(300)]

SLACK_S = 20.0  # replay and a machine that is shared


def answered(victim: Victim, after: int, harm: Callable[[], None]) -> tuple[list[Piece], float]:
    """The whole stream, and the longest silence in it after the harm, in seconds.

    What had left the worker before it was harmed still comes, so the first token afterwards tells
    nothing.
    """
    pieces: list[Piece] = []
    harmed_s = silence_s = 0.0
    for piece in victim.stream():
        if harmed_s:
            silence_s = max(silence_s, piece.at_s - max(harmed_s, pieces[-1].at_s))
        pieces.append(piece)
        if len(pieces) == after:
            harm()
            harmed_s = time.monotonic()
    return pieces, silence_s


@contextmanager
def meanwhile(harm: Callable[[], None]) -> Iterator[None]:
    """Does harm while the block runs."""
    thread = threading.Thread(target=harm)
    thread.start()
    yield
    thread.join()


def require_whole(victim: Victim, pieces: list[Piece]) -> None:
    assert "".join(piece.text for piece in pieces) == victim.expected
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["length"]


@pytest.mark.parametrize("harm", ["kill", "stop"])
def test_a_decode_worker_is_lost_while_it_generates(victim: Victim, harm: str) -> None:
    def lose() -> None:
        getattr(victim, harm)(victim.generating())

    pieces, seconds = answered(victim, 30, lose)
    require_whole(victim, pieces)
    sys.stdout.write(f"{harm} of a decode worker: next token after {seconds:.2f} s\n")
    assert seconds < LEASE_S + SLACK_S


@pytest.mark.parametrize("harm", ["kill", pytest.param("stop", marks=pytest.mark.lengthy)])
def test_a_decode_worker_is_lost_before_the_first_token(victim: Victim, harm: str) -> None:
    with meanwhile(lambda: getattr(victim, harm)(victim.admitting())):
        require_whole(victim, list(victim.stream()))


@pytest.mark.lengthy
def test_both_decode_workers_are_killed_and_one_comes_back(victim: Victim) -> None:
    def lose_both() -> None:
        for name in ("decode-1", "decode-2"):
            victim.kill(name)
        victim.stack.start("decode-1")

    pieces, _ = answered(victim, 30, lose_both)
    require_whole(victim, pieces)


def test_redis_is_killed_and_comes_back_empty(victim: Victim) -> None:
    pieces, _ = answered(victim, 10, lambda: victim.kill("redis"))
    require_whole(victim, pieces)
    require_whole(victim, list(victim.stream()))  # with what the gateway knows from before
    victim.restore()
    time.sleep(LEASE_S)
    require_whole(victim, list(victim.stream()))


@pytest.mark.lengthy
def test_redis_does_not_answer(victim: Victim) -> None:
    pieces, _ = answered(victim, 10, lambda: victim.stop("redis"))
    require_whole(victim, pieces)
    require_whole(victim, list(victim.stream()))


def test_the_prefill_worker_is_killed_under_a_prompt(victim: Victim) -> None:
    def kill_while_it_prefills() -> None:
        victim.admitting()
        victim.kill_replica(":Prefill")

    with meanwhile(kill_while_it_prefills):
        require_whole(victim, list(victim.stream()))


def test_the_gateway_is_killed_and_is_back_for_the_next_request(victim: Victim) -> None:
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        answered(victim, 10, lambda: victim.kill_replica(":Gateway"))
    victim.require_idle()  # nobody reads these tokens any more
    victim.restore()
    require_whole(victim, list(victim.stream()))


def test_a_client_that_goes_away_frees_what_it_held(victim: Victim) -> None:
    stream = victim.stream()
    for _ in range(5):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    victim.require_idle(10)


@pytest.mark.lengthy
def test_a_client_that_reads_slowly_gets_everything(victim: Victim) -> None:
    pieces = []
    for piece in victim.stream():
        pieces.append(piece)
        if len(pieces) in (5, 50):
            time.sleep(2 * LEASE_S)
    require_whole(victim, pieces)
    assert len(pieces) <= NUM_TOKENS
