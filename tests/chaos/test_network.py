"""The network between the processes is slow, silent or breaks."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from tests.chaos.asking import (
    OVERHEAD_S,
    Measured,
    ask,
    broken_off,
    meanwhile,
    require_first_token_in_time,
    require_in_time,
    require_next_token_in_time,
)
from tests.chaos.linked_stack import CONTROL, KV, REDIS
from tests.chaos.network import CLEAR, CRAWLING, SILENT, Condition
from tests.chaos.victim import ENDLESS, LEASE_S, WORKERS, Victim, other_than
from tests.deploy.stack import OURS

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(600)]

ADMISSION_TIMEOUT_S = 5.0  # services/gateway/request/generate_call.py
PATIENCE_S = 30.0  # services/gateway/request/generation_run.py
REDIS_TIMEOUT_S = 2.0  # services/common/registry.py
KEEPALIVE_S = 30.0  # services/common/rpc.py, interval and timeout
STALL_TIMEOUT_S = 15.0  # services/prefill/sender.py
SLOW = Condition(bytes_per_s=4e6, delay_s=0.02)
NOTHING_UP = replace(CLEAR, up=False)
NOTHING_DOWN = replace(CLEAR, down=False)


def of_workers(link: str) -> list[str]:
    return [f"{name} {link}" for name in WORKERS]


def test_a_slow_network_costs_time_only(victim: Victim) -> None:
    victim.network.become(SLOW, *victim.network.links)
    ask(victim).require_whole(victim)


@pytest.mark.parametrize(
    "condition", [SILENT, pytest.param(NOTHING_DOWN, marks=pytest.mark.lengthy)]
)
def test_a_token_stream_goes_silent(victim: Victim, condition: Condition) -> None:
    def silence() -> None:
        victim.network.become(condition, f"{victim.generating()} {CONTROL}")

    require_next_token_in_time(victim, "silence on a token stream", silence)


@pytest.mark.lengthy
def test_a_token_stream_whose_way_back_is_dead_needs_none(victim: Victim) -> None:
    def silence() -> None:
        victim.network.become(NOTHING_UP, f"{victim.generating()} {CONTROL}")

    ask(victim, 30, silence).require_whole(victim)


@pytest.mark.lengthy
def test_a_token_stream_is_reset(victim: Victim) -> None:
    def reset() -> None:
        victim.network.reset(f"{victim.generating()} {CONTROL}")

    require_next_token_in_time(victim, "reset of a token stream", reset, lease_s=0)


def test_a_kv_transfer_is_reset(victim: Victim) -> None:
    victim.network.become(CRAWLING, *of_workers(KV))

    def reset() -> None:
        name = victim.receiving()
        victim.network.become(CLEAR, *of_workers(KV))
        victim.network.reset(f"{name} {KV}")

    with meanwhile(reset):
        asked = ask(victim)
    asked.require_whole(victim)


@pytest.mark.lengthy
@pytest.mark.parametrize("condition", [SILENT, NOTHING_UP, NOTHING_DOWN])
def test_a_kv_transfer_goes_silent(victim: Victim, condition: Condition) -> None:
    def silence_both() -> None:
        victim.network.become(condition, *of_workers(KV))

    def heal_the_other() -> None:
        victim.network.become(CLEAR, f"{other_than(victim.admitting())} {KV}")

    require_first_token_in_time(
        victim, f"{condition} on KV", STALL_TIMEOUT_S, silence_both, heal_the_other
    )


def test_a_worker_that_does_not_answer_is_passed_over(victim: Victim) -> None:
    def silence_both() -> None:
        victim.network.become(SILENT, *of_workers(CONTROL))

    def heal_the_other() -> None:
        victim.network.become(CLEAR, f"{other_than(victim.held_back(CONTROL))} {CONTROL}")

    require_first_token_in_time(
        victim, "silence at admission", ADMISSION_TIMEOUT_S, silence_both, heal_the_other
    )


@pytest.mark.lengthy
def test_both_workers_are_cut_off_in_mid_stream(victim: Victim) -> None:
    """The gateway cannot tell them; they notice themselves, though nothing heals."""

    def cut_off() -> float:
        victim.generating()
        victim.network.become(SILENT, *of_workers(CONTROL))
        return time.monotonic()

    def measure() -> Measured:
        with ThreadPoolExecutor(1) as thread:
            harm = thread.submit(cut_off)
            freed = thread.submit(victim.require_idle, KEEPALIVE_S + OVERHEAD_S)
            with pytest.raises(openai.APIError) as raised:
                list(victim.stream(ENDLESS))
            seconds = time.monotonic() - harm.result()
            freed.result()
        assert raised.value.code == "no_decode_worker"
        last_look_s = len(WORKERS) * ADMISSION_TIMEOUT_S  # begun just before its time was over
        limit_s = LEASE_S + PATIENCE_S + last_look_s
        return Measured(seconds, limit_s, "lease + looking for another")

    with broken_off(victim, OVERHEAD_S):
        require_in_time(victim, "cut off from all workers to the error", measure)


@pytest.mark.lengthy
def test_both_workers_are_cut_off_before_admission(victim: Victim) -> None:
    victim.network.become(SILENT, *of_workers(CONTROL))
    started_s = time.monotonic()
    with pytest.raises(openai.InternalServerError) as raised:
        ask(victim)
    assert raised.value.code == "no_decode_worker"
    assert time.monotonic() - started_s < 2 * ADMISSION_TIMEOUT_S + OVERHEAD_S


def test_nobody_reaches_redis(victim: Victim) -> None:
    def silence() -> None:
        victim.network.become(SILENT, *(f"{name} {REDIS}" for name in OURS))
        time.sleep(1)  # what the gateway has read before is old by then

    require_first_token_in_time(victim, "silence of Redis", REDIS_TIMEOUT_S, silence)


@pytest.mark.lengthy
@pytest.mark.parametrize("harm", ["slow", "reset"])
def test_redis_is_hard_to_reach(victim: Victim, harm: str) -> None:
    links = [f"{name} {REDIS}" for name in OURS]
    if harm == "slow":
        victim.network.become(replace(CLEAR, delay_s=0.5), *links)
    for _ in range(3):
        if harm == "reset":
            victim.network.reset(*links)
        ask(victim).require_whole(victim)


@pytest.mark.lengthy
def test_a_worker_without_redis_leaves_the_routing_and_comes_back(victim: Victim) -> None:
    victim.network.become(SILENT, f"decode-1 {REDIS}")
    require_workers(victim, 1, LEASE_S)
    ask(victim).require_whole(victim)
    victim.network.heal()
    require_workers(victim, 2, LEASE_S)


def require_workers(victim: Victim, num_workers: int, within_s: float) -> None:
    """So many are in the routing, at most `within_s` and 2 s from now."""
    _wait(lambda: victim.ready()["decode_workers"] == num_workers, within_s + OVERHEAD_S)


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s"
        time.sleep(0.1)
