"""The machine under the processes misbehaves: no room for logs, a clock that jumps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import openai
import psutil
import pytest

from tests.chaos.asking import ask
from tests.chaos.victim import WORKERS, Victim

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(600)]

HOUR_S = 3600


@contextmanager
def no_room_for_files(victim: Victim) -> Iterator[None]:
    """No file can grow any more, as on a full disk."""
    processes = list(victim.logging())
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    try:
        for process, (_, hard) in zip(processes, before, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
        yield
    finally:
        for process, limits in zip(processes, before, strict=True):
            with suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limits)


@pytest.mark.lengthy
def test_logs_that_find_no_room_cost_no_request(victim: Victim) -> None:
    with no_room_for_files(victim):
        log_bytes = victim.log_bytes()
        ask(victim).require_whole(victim)
        with pytest.raises(openai.BadRequestError):
            victim.openai.completions.create(model="winnow-tiny", prompt="")
        ask(victim, 30, lambda: victim.kill(victim.generating())).require_whole(victim)
        assert victim.log_bytes() == log_bytes
    ask(victim).require_whole(victim)
    assert victim.log_bytes() > log_bytes


@contextmanager
def no_room_for_the_log(victim: Victim, name: str) -> Iterator[None]:
    """Of the process of that name that is started next."""
    log = victim.stack.log(name)
    log.unlink()
    log.symlink_to("/dev/full")
    try:
        yield
    finally:
        log.unlink()


def test_a_worker_starts_where_its_log_finds_no_room(victim: Victim) -> None:
    with no_room_for_the_log(victim, "decode-1"):
        victim.kill("decode-1")
        victim.restore()
        victim.kill("decode-2")
        ask(victim).require_whole(victim)


@pytest.mark.lengthy
def test_a_gateway_starts_where_its_log_finds_no_room(victim: Victim) -> None:
    with no_room_for_the_log(victim, "gateway"):
        victim.restart_gateway()
        ask(victim).require_whole(victim)


def require_same_stream_over_a_jump(victim: Victim, hours: int, *names: str) -> None:
    ask(victim, 30, lambda: victim.clocks.jump(hours * HOUR_S, *names)).require_whole(victim)
    ask(victim).require_whole(victim)


@pytest.mark.parametrize("hours", [pytest.param(6, marks=pytest.mark.lengthy), -6])
def test_the_clocks_of_workers_and_redis_jump_under_a_request(victim: Victim, hours: int) -> None:
    require_same_stream_over_a_jump(victim, hours, *WORKERS, "redis")


@pytest.mark.lengthy
@pytest.mark.parametrize("hours", [6, -6])
@pytest.mark.parametrize("name", ["decode-1", "redis"])
def test_one_clock_jumps_under_a_request(victim: Victim, name: str, hours: int) -> None:
    require_same_stream_over_a_jump(victim, hours, name)


@pytest.fixture
def old_gateway(victim: Victim) -> Iterator[None]:
    """A new one comes after the case.

    Ray Serve's health checks are on the wall clock: after that was set back, a replica that dies
    would be missed only when it has caught up.
    """
    yield
    victim.clocks.jump(0)
    victim.restart_gateway()


@pytest.mark.lengthy
@pytest.mark.usefixtures("old_gateway")
@pytest.mark.parametrize("names", [("gateway",), ("gateway", *WORKERS, "redis")])
def test_the_gateways_clock_jumps_under_a_request(victim: Victim, names: tuple[str, ...]) -> None:
    for hours in (6, -6):
        require_same_stream_over_a_jump(victim, hours, *names)
        assert abs(victim.created_s() - time.time() - hours * HOUR_S) < HOUR_S
