"""The machine under the processes misbehaves: no room for logs, a clock that jumps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import psutil
import pytest

from tests.chaos.asking import ask
from tests.chaos.victim import Victim

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(300)]

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
            process.rlimit(psutil.RLIMIT_FSIZE, limits)


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


def test_a_worker_starts_where_its_log_finds_no_room(victim: Victim) -> None:
    log = victim.stack.log("decode-1")
    victim.kill("decode-1")
    log.unlink()
    log.symlink_to("/dev/full")
    try:
        victim.restore()
        victim.kill("decode-2")
        ask(victim).require_whole(victim)
    finally:
        log.unlink()


@pytest.mark.parametrize("hours", [6, -6])
def test_every_clock_jumps_under_a_request(victim: Victim, hours: int) -> None:
    ask(victim, 30, lambda: victim.clocks.jump(hours * HOUR_S)).require_whole(victim)
    ask(victim).require_whole(victim)
    assert abs(victim.created_s() - time.time() - hours * HOUR_S) < HOUR_S


@pytest.mark.lengthy
@pytest.mark.parametrize("hours", [6, -6])
@pytest.mark.parametrize("name", ["gateway", "decode-1", "redis"])
def test_one_clock_jumps_under_a_request(victim: Victim, name: str, hours: int) -> None:
    ask(victim, 30, lambda: victim.clocks.jump(hours * HOUR_S, name)).require_whole(victim)
    ask(victim).require_whole(victim)
