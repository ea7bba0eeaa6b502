"""Every process is killed and stopped in every state of a prompt.

The states are those of services/gateway/request/states.py.

Silent and crawling links hold a prompt in its state until the harm is done. ADMITTED lasts no time
of its own: prefill is asked at once.
"""

import asyncio
import time
from collections.abc import Callable

import httpx
import openai
import pytest

from services.gateway.request.states import State
from tests.chaos.asking import OVERHEAD_S, ask, broken_off, meanwhile
from tests.chaos.linked_stack import CONTROL, KV
from tests.chaos.network import CRAWLING, SILENT
from tests.chaos.victim import (
    LEASE_S,
    LONG_ANSWER,
    ONE_ANSWER,
    REQUEST_TIMEOUT_S,
    WORKERS,
    Victim,
    other_than,
)

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.lengthy, pytest.mark.timeout(600)]

STOPPED_S = 2 * LEASE_S


def received(victim: Victim) -> str:
    victim.wait_until_waiting_for("admission")
    return victim.held_back(CONTROL)


def prefilling(victim: Victim) -> str:
    victim.wait_until_waiting_for("prefill")
    return victim.admitting()


def decoding(victim: Victim) -> str:
    return victim.generating()


def moving(victim: Victim) -> str:
    victim.network.become(CRAWLING, f"{(draining := victim.generating())} {KV}")
    victim.begin_drain(draining)
    victim.wait_until_giving(draining)
    return draining


def lost(victim: Victim) -> str:
    victim.network.become(SILENT, f"{other_than(first := victim.generating())} {CONTROL}")
    victim.kill(first)
    return received(victim)


# How a prompt gets there; returns the decode worker that it needs next.
REACH: dict[State, Callable[[Victim], str]] = {
    State.RECEIVED: received,
    State.PREFILLING: prefilling,
    State.DECODING: decoding,
    State.MOVING: moving,
    State.LOST: lost,
}
HELD_BY = {State.RECEIVED: CONTROL, State.PREFILLING: KV}
FREED_S = 10.0


def hold(victim: Victim, state: State) -> None:
    """Keeps the next prompt from going beyond the state, if it does not last by itself."""
    if state in HELD_BY:
        victim.network.become(SILENT, *(f"{name} {HELD_BY[state]}" for name in WORKERS))


def harm_in_passing(victim: Victim, harm: str, target: str) -> None:
    """Lets the prompt go on, too; returns when the harm is over."""
    getattr(victim, harm)(target)
    victim.network.heal()
    time.sleep(STOPPED_S if harm == "stop" else 0)
    victim.restore()


@pytest.mark.parametrize("harm", ["kill", "stop"])
@pytest.mark.parametrize("target", ["decode", "prefill", "gateway", "redis"])
@pytest.mark.parametrize("state", REACH)
def test_the_answer_is_whole_or_ends_in_one_error(
    victim: Victim, state: State, target: str, harm: str
) -> None:
    def do_harm() -> None:
        worker = REACH[state](victim)
        harm_in_passing(victim, harm, worker if target == "decode" else target)

    hold(victim, state)
    body = LONG_ANSWER if state is State.MOVING else ONE_ANSWER
    started_s = time.monotonic()
    with meanwhile(do_harm):
        if (target, harm) == ("gateway", "kill"):
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                ask(victim, body=body)
        else:
            ask(victim, body=body).require_whole(victim)
        assert time.monotonic() - started_s < REQUEST_TIMEOUT_S + OVERHEAD_S


@pytest.mark.parametrize("harm", ["kill", "stop"])
def test_who_was_to_take_over_is_lost_in_the_move(victim: Victim, harm: str) -> None:
    def do_harm() -> None:
        harm_in_passing(victim, harm, other_than(moving(victim)))

    with meanwhile(do_harm):
        ask(victim, body=LONG_ANSWER).require_whole(victim)


@pytest.mark.parametrize("state", REACH)
def test_a_client_that_goes_away_frees_what_it_held(victim: Victim, state: State) -> None:
    hold(victim, state)
    with broken_off(victim, FREED_S):
        asyncio.run(victim.leave(lambda: REACH[state](victim)))
        victim.restore()
