"""A stream while nothing is generated: its headers, its comments, its end."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai.types import Completion

from services.gateway.request.generation_run import PromptRun
from services.gateway.rest import event_stream
from tests.deadlines import SOON_S
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import Overloaded, PrefillFailed
from winnow.tokens import Token

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEEPALIVE_S = 0.1
COMMENT = ": keep-alive"
BODY = {
    "model": MODEL_NAME,
    "prompt": "the quick",
    "max_tokens": 3,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url, sse_keepalive_s=KEEPALIVE_S) as service:
        yield service
        await service.until_idle()


@pytest.fixture
def held(service: TestService) -> Iterator[TestService]:
    """Prefill begins nothing until `service.prefiller.hold` is set."""
    service.prefiller.hold_jobs()
    yield service
    service.prefiller.hold.set()


async def read_until(lines: AsyncIterator[str], what: str, times: int = 1) -> None:
    async for line in lines:
        times -= line == what
        if not times:
            return
    raise AssertionError(f"the stream ended without {what!r}")


async def test_headers_go_out_on_admission_and_comments_until_the_first_token(
    held: TestService,
) -> None:
    async with held.http.stream("POST", "/v1/completions", json=BODY) as response:
        assert response.status_code == 200
        assert response.headers["x-accel-buffering"] == "no"
        lines = response.aiter_lines()
        await read_until(lines, COMMENT, times=3)
        held.prefiller.hold.set()
        rest = [line async for line in lines if line and line != COMMENT]
    assert rest[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
    assert chunks[0]["id"] == response.headers["x-request-id"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_comments_come_at_the_interval_that_is_set(held: TestService) -> None:
    started_s = time.monotonic()
    async with held.http.stream("POST", "/v1/completions", json=BODY) as response:
        await read_until(response.aiter_lines(), COMMENT, times=6)
        assert time.monotonic() - started_s > 5.5 * KEEPALIVE_S


async def test_the_official_client_reads_over_comments(held: TestService) -> None:
    async def ask() -> list[Completion]:
        parameters: dict[str, Any] = {
            name: BODY[name] for name in ("model", "prompt", "max_tokens")
        }
        stream = await held.openai.completions.create(**parameters, stream=True)
        return [chunk async for chunk in stream]

    asking = asyncio.create_task(ask())
    await held.prefiller.asked.wait()
    await asyncio.sleep(0.3 + 2 * KEEPALIVE_S)
    held.prefiller.hold.set()
    chunks = await asking
    assert chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("method", ["chat", "text"])
async def test_silence_between_tokens_is_filled_too(
    service: TestService, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tokens = PromptRun.tokens

    async def slow_tokens(run: PromptRun) -> AsyncGenerator[list[Token]]:
        async for step in tokens(run):
            yield step
            await asyncio.sleep(3 * KEEPALIVE_S)

    monkeypatch.setattr(PromptRun, "tokens", slow_tokens)
    path, body = "/v1/completions", dict(BODY)
    if method == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "hi"}]
        del body["prompt"]
    lines = (await service.http.post(path, json=body)).text.split("\n\n")
    comments = [idx for idx, line in enumerate(lines) if line == COMMENT]
    events = [idx for idx, line in enumerate(lines) if line.startswith("data: {")]
    assert [idx for idx in comments if events[0] < idx < events[-1]]


@pytest.mark.parametrize("keepalive_s", [0, None])
async def test_without_comments_the_headers_still_go_out(
    model_path: Path, redis_url: str, keepalive_s: int | None
) -> None:
    async with running_service(model_path, redis_url, sse_keepalive_s=keepalive_s) as service:
        service.prefiller.hold_jobs()
        async with service.http.stream("POST", "/v1/completions", json=BODY) as response:
            assert response.status_code == 200
            service.prefiller.hold.set()
            text = (await response.aread()).decode()
    assert COMMENT not in text
    assert text.endswith("data: [DONE]\n\n")


async def test_an_error_after_a_silence_is_the_last_event(held: TestService) -> None:
    failure = PrefillFailed("the engine is on fire")
    held.prefiller.failures = [failure, failure]
    async with held.http.stream("POST", "/v1/completions", json=BODY) as response:
        lines = response.aiter_lines()
        await read_until(lines, COMMENT)
        held.prefiller.hold.set()
        rest = [line async for line in lines if line and line != COMMENT]
    assert len(rest) == 1
    assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "prefill_failed"


async def test_a_deadline_in_a_silence_is_the_last_event(model_path: Path, redis_url: str) -> None:
    async with running_service(
        model_path, redis_url, request_timeout_s=3, sse_keepalive_s=0.1
    ) as service:
        service.prefiller.hold_jobs()
        response = await service.http.post("/v1/completions", json=BODY)
        assert response.status_code == 200
        last = response.text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        await service.until_idle()


async def test_what_is_refused_before_admission_keeps_its_status(
    service: TestService, model_path: Path, redis_url: str
) -> None:
    for changes, status in (({"model": "other"}, 404), ({"n": 99}, 400)):
        refused = await service.http.post("/v1/completions", json=BODY | changes)
        assert refused.status_code == status
    async with running_service(model_path, redis_url, num_workers=0) as nobody:
        refused = await nobody.http.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    async with running_service(
        model_path, redis_url, kv_memory_bytes=2 << 20, kv_overcommit=1
    ) as small:
        small.prefiller.hold_jobs()
        async with AsyncExitStack() as running:
            big = BODY | {"prompt": [5] * 1000, "max_tokens": 200}
            while True:
                stream = small.http.stream("POST", "/v1/completions", json=big)
                response = await running.enter_async_context(stream)
                if response.status_code != 200:
                    break
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            small.prefiller.hold.set()


async def test_a_full_queue_for_prefill_is_429(service: TestService) -> None:
    service.prefiller.failures = [Overloaded("64 prompts wait for prefill; the limit is 64")]
    refused = await service.http.post("/v1/completions", json=BODY)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "overloaded"


async def test_a_client_that_leaves_in_a_silence_cancels_its_prefill(held: TestService) -> None:
    async with httpx.AsyncClient(base_url=held.url) as client:
        async with client.stream("POST", "/v1/completions", json=BODY) as response:
            await read_until(response.aiter_lines(), COMMENT)
        async with asyncio.timeout(SOON_S):
            await held.prefiller.cancelled.wait()


async def test_a_client_that_stops_reading_is_ended_at_the_deadline(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However full its buffers are, comments do not pile up and nothing is held for it."""
    monkeypatch.setattr(event_stream, "_ERROR_TIMEOUT_S", 0.2)
    settings: dict[str, Any] = {"request_timeout_s": 4, "sse_keepalive_s": 0.01}
    async with running_service(model_path, redis_url, **settings) as service:
        host, _, port = service.url.removeprefix("http://").partition(":")
        with contextlib.closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            body = json.dumps(BODY | {"max_tokens": 4000, "n": 4, "logprobs": 20}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n"
            client.send(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            async with asyncio.timeout(SOON_S):
                while service.workers[0].engine.stats().running_sequences < 4:
                    await service.http.get("/health")
            await service.until_idle()
