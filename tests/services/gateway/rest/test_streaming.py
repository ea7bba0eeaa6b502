"""Server-sent events: what clients see while tokens come, when things fail, when they leave."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from services.common.metrics import render
from services.gateway.request.generation_run import PromptRun
from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import PrefillFailed
from winnow.tokens import Token

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
BODY: dict[str, Any] = {
    "model": MODEL_NAME,
    "prompt": "the quick",
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


async def sse_lines(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        yield line


async def test_events_are_framed_as_openai_clients_expect(service: TestService) -> None:
    response = await service.http.post("/v1/completions", json=BODY | {"max_tokens": 3})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert response.headers["x-request-id"] == chunks[0]["id"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_ends_when_its_request_is_over(
    service: TestService, caplog: pytest.LogCaptureFixture
) -> None:
    """The client closes the connection then, which would cancel what is left to do."""
    asked = BODY | {"prompt": ["the fox", "a dog", "lazy"], "max_tokens": 3}
    with caplog.at_level(logging.INFO, logger="services.gateway"):
        async with service.http.stream("POST", "/v1/completions", json=asked) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    break
            metrics = render(service.gateway.metrics.registry).decode()
    assert value(metrics, "winnow_requests_running") == 0
    (told,) = [r.getMessage() for r in caplog.records if r.name.endswith(".outcomes")]
    assert told.startswith("finished: ")


async def test_streamed_pieces_join_to_the_whole_answer(service: TestService) -> None:
    given: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": ["the fox", "a dog"],
        "n": 2,
        "max_tokens": 20,
    } | GREEDY
    whole = await service.openai.completions.create(**given)
    texts = [""] * 4
    async for chunk in await service.openai.completions.create(**given, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


async def test_chat_stream_begins_with_the_role_of_each_choice(service: TestService) -> None:
    stream = await service.openai.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        max_tokens=8,
        stream=True,
        **GREEDY,
    )
    roles: dict[int, list[str | None]] = {0: [], 1: []}
    async for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            roles[choice.index].append(choice.delta.role)
    for seen in roles.values():
        assert seen[0] == "assistant"
        assert not any(seen[1:])


async def test_usage_comes_last_without_choices_when_asked_for(service: TestService) -> None:
    stream = await service.openai.completions.create(
        model=MODEL_NAME,
        prompt="the fox",
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    assert "winnow" in chunks[-1].usage.to_dict()
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_each_streamed_token_has_its_logprobs(service: TestService) -> None:
    given: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": "the fox",
        "max_tokens": 12,
        "logprobs": 1,
    } | GREEDY
    whole = (await service.openai.completions.create(**given)).choices[0].logprobs
    streamed: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": []}
    async for chunk in await service.openai.completions.create(**given, stream=True):
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        for name, values in streamed.items():
            values.extend(getattr(logprobs, name))
    assert whole is not None
    assert streamed["tokens"] == whole.tokens
    assert streamed["text_offset"] == whole.text_offset
    assert streamed["token_logprobs"] == pytest.approx(whole.token_logprobs, abs=1e-3)


async def test_a_stop_string_is_never_streamed(service: TestService) -> None:
    given: dict[str, Any] = {"model": MODEL_NAME, "prompt": "the fox", "max_tokens": 40} | GREEDY
    whole = (await service.openai.completions.create(**given)).choices[0].text
    stop = whole[12:16]
    seen, reasons = "", []
    async for chunk in await service.openai.completions.create(**given, stop=stop, stream=True):
        seen += chunk.choices[0].text
        reasons.append(chunk.choices[0].finish_reason)
    assert seen == whole[: whole.index(stop)]
    assert reasons[-1] == "stop"


async def test_an_error_before_the_first_token_is_the_streams_only_event(
    service: TestService,
) -> None:
    failure = PrefillFailed("the engine is on fire")
    service.prefiller.failures = [failure, failure]
    response = await service.http.post("/v1/completions", json=BODY)
    assert response.status_code == 200
    event, end = response.text.split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "prefill_failed"
    assert end == ""


async def test_an_error_in_mid_stream_is_the_streams_last_event(
    model_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.request.generation_run._PATIENCE_S", 0.3)
    async with running_service(model_path, redis_url) as service:
        body = BODY | {"max_tokens": 4000}
        async with service.http.stream("POST", "/v1/completions", json=body) as response:
            lines = sse_lines(response)
            assert (await anext(lines)).startswith('data: {"id"')
            await service.workers[0].stop()
            rest = [line async for line in lines if line]
        assert response.status_code == 200
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("no_decode_worker", "service_unavailable_error")
        assert error["message"].startswith("no decode worker can serve the request now")


async def test_the_official_client_raises_an_error_in_mid_stream(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url, request_timeout_s=2) as service:
        stream = await service.openai.completions.create(
            model=MODEL_NAME, prompt="the fox", max_tokens=4000, stream=True, **GREEDY
        )
        with pytest.raises(openai.APIError, match=r"did not end in its time"):
            async for _ in stream:
                pass
        await service.until_idle()


async def test_a_request_over_its_time_gets_504(model_path: Path, redis_url: str) -> None:
    async with running_service(model_path, redis_url, request_timeout_s=0.3) as service:
        body = BODY | {"max_tokens": 4000, "stream": False}
        response = await service.http.post("/v1/completions", json=body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        await service.until_idle()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_during_decode_leaves_nothing_behind(
    service: TestService, stream: bool
) -> None:
    async with httpx.AsyncClient(base_url=service.url) as client:
        body = BODY | {"max_tokens": 4000, "stream": stream}
        leaving = asyncio.create_task(client.post("/v1/completions", json=body, timeout=60))
        engine = service.workers[0].engine
        async with asyncio.timeout(SOON_S):
            while not engine.stats().running_sequences:
                await service.http.get("/health")
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    await service.until_idle()


async def test_a_prompt_that_is_cancelled_by_nobody_ends_in_an_error(
    service: TestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(_: PromptRun) -> AsyncGenerator[list[Token]]:
        raise asyncio.CancelledError
        yield []

    monkeypatch.setattr(PromptRun, "tokens", cancelled)
    answer = await service.http.post("/v1/completions", json=BODY | {"stream": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


async def test_a_client_that_leaves_during_prefill_cancels_it(service: TestService) -> None:
    service.prefiller.hold_jobs()
    try:
        async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(SOON_S):
            leaving = asyncio.create_task(client.post("/v1/completions", json=BODY, timeout=60))
            await service.prefiller.asked.wait()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await service.prefiller.cancelled.wait()
        await service.until_idle()
    finally:
        service.prefiller.hold.set()
