"""Processes are killed and stopped under a request; the client gets the answer all the same."""

import asyncio
import time

import httpx
import openai
import pytest

from tests.chaos.asking import (
    Asked,
    Measured,
    ask,
    broken_off,
    meanwhile,
    require_in_time,
    require_next_token_in_time,
)
from tests.chaos.linked_stack import KV
from tests.chaos.network import CRAWLING, SILENT
from tests.chaos.victim import (
    ENDLESS,
    KV_LEASE_S,
    LEASE_S,
    LONG_ANSWER,
    WORKERS,
    Victim,
    other_than,
)

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.mark.parametrize("harm", ["kill", "stop"])
def test_a_decode_worker_is_lost_while_it_generates(victim: Victim, harm: str) -> None:
    def lose() -> None:
        getattr(victim, harm)(victim.generating())

    lease_s = 0 if harm == "kill" else LEASE_S  # its connections break at once
    require_next_token_in_time(victim, f"{harm} of a decode worker", lose, lease_s)


def test_a_decode_worker_is_killed_before_the_first_token(victim: Victim) -> None:
    victim.network.become(SILENT, *(f"{name} {KV}" for name in WORKERS))  # until it is dead

    def kill_while_it_waits() -> None:
        victim.kill(victim.admitting())
        victim.network.heal()

    with meanwhile(kill_while_it_waits):
        ask(victim).require_whole(victim)


def test_a_decode_worker_drains_while_it_generates(victim: Victim) -> None:
    num_moves = victim.num_moves()

    def measure() -> Measured:
        asked = ask(victim, 5, lambda: victim.begin_drain(victim.generating()), LONG_ANSWER)
        asked.require_whole(victim)
        return Measured(asked.silence_s, 0, "no lease, no replay")

    require_in_time(victim, "drain of a decode worker to the next token", measure)
    assert victim.num_moves() > num_moves


@pytest.mark.lengthy
def test_the_worker_that_takes_over_from_a_draining_one_is_killed(victim: Victim) -> None:
    before = victim.num_computed_anew()

    def drain_and_kill() -> None:
        num_moves = victim.num_moves()
        victim.begin_drain(draining := victim.generating())
        victim.wait_until_moved(num_moves + 1)
        victim.kill(other_than(draining))
        assert victim.end_of_drain(draining) == 0
        victim.stack.start(draining)

    ask(victim, 5, drain_and_kill, LONG_ANSWER).require_whole(victim)
    assert victim.num_computed_anew() == before + 1


@pytest.mark.lengthy
def test_both_decode_workers_are_killed_and_one_comes_back(victim: Victim) -> None:
    def lose_both() -> None:
        for name in WORKERS:
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
    before = victim.num_prefilled_anew()
    victim.network.become(CRAWLING, *(f"{name} {KV}" for name in WORKERS))

    def kill_while_it_sends() -> None:
        victim.receiving()
        victim.kill("prefill")
        victim.network.heal()

    with meanwhile(kill_while_it_sends):
        ask(victim).require_whole(victim)
    assert victim.num_prefilled_anew() > before


@pytest.mark.lengthy
def test_a_prefill_worker_that_hangs_costs_the_prompt_its_lease(victim: Victim) -> None:
    victim.stop("prefill")

    def measure() -> Measured:
        started_s = time.monotonic()
        with pytest.raises(openai.APIError) as raised:
            ask(victim)
        assert raised.value.code == "lease_expired"
        return Measured(time.monotonic() - started_s, KV_LEASE_S, "the KV's lease")

    require_in_time(victim, "stop of prefill to the error", measure)


def test_the_gateway_is_killed_and_is_back_for_the_next_request(victim: Victim) -> None:
    with broken_off(victim, 10), pytest.raises((openai.APIError, httpx.HTTPError)):
        for num_pieces, _ in enumerate(victim.stream(ENDLESS)):
            if num_pieces == 10:
                victim.kill("gateway")
    victim.restore()
    ask(victim).require_whole(victim)


def test_a_client_that_goes_away_in_mid_stream_frees_what_it_held(victim: Victim) -> None:
    with broken_off(victim, 10):
        asyncio.run(victim.leave(victim.generating))


@pytest.mark.lengthy
def test_a_client_that_stops_reading_for_a_while_gets_everything(victim: Victim) -> None:
    asked = Asked()
    for piece in victim.stream():
        asked.take(piece)
        if len(asked.pieces) in (5, 50):
            time.sleep(2 * LEASE_S)
    asked.require_whole(victim)
