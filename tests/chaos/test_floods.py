"""More comes than can be served; who behaves is served all the same."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.chaos.asking import ask, say
from tests.chaos.victim import Victim

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(600)]

NUM_CONNECTIONS = 400
NUM_REQUESTS = 200
MAX_GROWTH_BYTES = 300 << 20
Sizes = list[tuple[str, int, int]]  # as Victim.sizes
MANY = httpx.Limits(max_connections=NUM_REQUESTS)


@contextmanager
def connections(victim: Victim, say_first: bytes) -> Iterator[list[socket.socket]]:
    address = "127.0.0.1", victim.stack.ports["gateway WINNOW_PORT"]
    with ExitStack() as opened:
        sockets = [
            opened.enter_context(socket.create_connection(address, timeout=10))
            for _ in range(NUM_CONNECTIONS)
        ]
        for connection in sockets:
            connection.sendall(say_first)
        yield sockets


@pytest.mark.parametrize(
    "say_first",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"POST /v1/completions HTTP/1.1\r\nHost: winnow\r\nContent-Le", id="half"),
    ],
)
def test_connections_that_say_nothing_keep_nobody_out(victim: Victim, say_first: bytes) -> None:
    before = victim.sizes()
    with connections(victim, say_first):
        ask(victim).require_whole(victim)
        require_bounded(before, victim.sizes())


def test_requests_over_the_limit_are_refused_and_the_others_served(victim: Victim) -> None:
    before = victim.sizes()
    answers = asyncio.run(flood(victim))
    codes = Counter(answer.status_code for answer in answers)
    say(f"{NUM_REQUESTS} requests at once: {dict(codes)}")
    assert set(codes) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
        else:
            assert answer.json()["choices"][0]["finish_reason"] == "length"
    require_bounded(before, victim.sizes())
    victim.require_idle()
    ask(victim).require_whole(victim)


async def flood(victim: Victim) -> list[httpx.Response]:
    body = {
        "model": "winnow-tiny",
        "prompt": "The grass is green. " * 100,
        "max_tokens": 8,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(limits=MANY, timeout=120) as client:
        url = f"{victim.url}/v1/completions"
        return await asyncio.gather(*(client.post(url, json=body) for _ in range(NUM_REQUESTS)))


def require_bounded(before: Sizes, after: Sizes) -> None:
    for (name, pid, size), (_, pid_now, size_now) in zip(before, after, strict=True):
        assert pid == pid_now, f"{name} has died"
        assert size_now - size < MAX_GROWTH_BYTES, f"{name} grew from {size} to {size_now} bytes"
