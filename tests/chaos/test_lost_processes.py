"""Processes are killed and stopped under a request; the client gets the answer all the same."""

import time

import httpx
import openai
import pytest

from tests.chaos.asking import (
    Asked,
    Measured,
    ask,
    meanwhile,
    require_in_time,
    require_next_token_in_time,
    say,
)
from tests.chaos.victim import KV_LEASE_S, LEASE_S, Victim

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.mark.parametrize("harm", ["kill", "stop"])
def test_a_decode_worker_is_lost_while_it_generates(victim: Victim, harm: str) -> None:
    def lose() -> None:
        getattr(victim, harm)(victim.generating())

    require_next_token_in_time(victim, f"{harm} of a decode worker", lose)


def test_a_decode_worker_is_killed_before_the_first_token(victim: Victim) -> None:
    with meanwhile(lambda: victim.kill(victim.admitting())):
        ask(victim).require_whole(victim)


def test_a_decode_worker_drains_while_it_generates(victim: Victim) -> None:
    moves = victim.num_moves()
    asked = ask(victim, 5, lambda: victim.drain(victim.generating()))
    asked.require_whole(victim)
    assert victim.num_moves() == moves + 1
    say(f"drain of a decode worker to the next token: {asked.silence_s:.2f} s")


@pytest.mark.lengthy
def test_the_worker_that_takes_over_from_a_draining_one_is_killed(victim: Victim) -> None:
    def drain_and_kill() -> None:
        draining = victim.generating()
        (other,) = {"decode-1", "decode-2"} - {draining}
        victim.drain(draining)
        victim.kill(other)
        victim.stack.start(draining)

    ask(victim, 30, drain_and_kill).require_whole(victim)


@pytest.mark.lengthy
def test_both_decode_workers_are_killed_and_one_comes_back(victim: Victim) -> None:
    def lose_both() -> None:
        for name in ("decode-1", "decode-2"):
            victim.kill(name)
        victim.stack.start("decode-1")

    ask(victim, 30, lose_both).require_whole(victim)


def test_redis_is_killed_and_comes_back_empty(victim: Victim) -> None:
    ask(victim, 10, lambda: victim.kill("redis")).require_whole(victim)
    ask(victim).require_whole(victim)  # with what the gateway knows from before
    victim.restore()
    time.sleep(LEASE_S)
    ask(victim).require_whole(victim)


def test_the_prefill_worker_is_killed_under_a_prompt(victim: Victim) -> None:
    def kill_while_it_prefills() -> None:
        victim.admitting()
        victim.kill("prefill")

    with meanwhile(kill_while_it_prefills):
        ask(victim).require_whole(victim)


@pytest.mark.lengthy
def test_a_prefill_worker_that_hangs_costs_the_prompt_its_lease(victim: Victim) -> None:
    victim.stop("prefill")

    def measure() -> Measured:
        started_s = time.monotonic()
        with pytest.raises(openai.InternalServerError) as raised:
            ask(victim)
        assert raised.value.code == "lease_expired"
        return Measured(time.monotonic() - started_s, KV_LEASE_S, "the KV's lease")

    require_in_time(victim, "stop of prefill to the error", measure)


def test_the_gateway_is_killed_and_is_back_for_the_next_request(victim: Victim) -> None:
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        ask(victim, 10, lambda: victim.kill("gateway"))
    victim.require_idle()  # nobody reads these tokens any more
    victim.restore()
    ask(victim).require_whole(victim)


def test_a_client_that_goes_away_frees_what_it_held(victim: Victim) -> None:
    stream = victim.stream()
    for _ in range(5):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    victim.require_idle(10)


@pytest.mark.lengthy
def test_a_client_that_reads_slowly_gets_everything(victim: Victim) -> None:
    asked = Asked()
    for piece in victim.stream():
        asked.take(piece)
        if len(asked.pieces) in (5, 50):
            time.sleep(2 * LEASE_S)
    asked.require_whole(victim)
