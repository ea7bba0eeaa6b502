"""Every kind of bad input, sent to a real server: status, message, type, param and code."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.deadlines import SOON_S
from tests.services.exposed import value
from tests.services.gateway.service import MODEL_NAME, TestService, running_service

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_BODY_BYTES = 200_000
JSON = {"content-type": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    limits: dict[str, Any] = {
        "max_prompt_tokens": 1000,
        "max_new_tokens": 500,
        "max_n": 4,
        "max_prompts_per_request": 3,
        "max_body_bytes": MAX_BODY_BYTES,
        "max_select_tokens": 512,
        "max_kv_budget": 600,
        "max_decode_budget": 700,
        "pruning": {
            "window_size": 8,
            "select_tokens": 64,
            "kv_budget": 64,
            "decode_budget": 256,
            "observed_layers": 2,
            "min_layer": 1,
        },
    }
    async with running_service(model_path, redis_url, **limits) as service:
        yield service
        await service.until_idle()


async def assert_refused(
    response: httpx.Response,
    status: int,
    message: str,
    param: str | None,
    code: str = "invalid_value",
    kind: str = "invalid_request_error",
) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == (kind, param, code)


async def assert_serves(service: TestService) -> None:
    answer = await service.openai.completions.create(model=MODEL_NAME, prompt="a", max_tokens=1)
    assert answer.usage is not None and answer.usage.completion_tokens == 1


# What is sent over a good request: (changes, status, part of the message, param, code)
COMPLETION_CASES: list[tuple[dict[str, Any], int, str, str, str]] = [
    ({"prompt": ""}, 400, "at least 1 token", "prompt", "invalid_request"),
    ({"prompt": []}, 400, "at least 1 token", "prompt", "invalid_request"),
    ({"prompt": [[]]}, 400, "at least 1 token", "prompt[0]", "invalid_request"),
    ({"prompt": ["a", ""]}, 400, "at least 1 token", "prompt[1]", "invalid_request"),
    ({"prompt": 7}, 400, "prompt must be a text", "prompt", "invalid_request"),
    ({"prompt": None}, 400, "prompt must be a text", "prompt", "invalid_request"),
    ({"prompt": [True]}, 400, "neither a text nor", "prompt[0]", "invalid_request"),
    ({"prompt": [[1], "a", [1.5]]}, 400, "neither a text nor", "prompt[2]", "invalid_request"),
    ({"prompt": ["a"] * 4}, 400, "4 prompts; the limit is 3", "prompt", "invalid_value"),
    ({"prompt": [5, 320]}, 400, "id 320; the vocabulary goes", "prompt", "invalid_request"),
    ({"prompt": [-1]}, 400, "id -1; the vocabulary goes", "prompt", "invalid_request"),
    ({"prompt": [10**30]}, 400, "the vocabulary goes", "prompt", "invalid_request"),
    ({"prompt": [[1], [999]]}, 400, "from 0 to 319", "prompt[1]", "invalid_request"),
    (
        {"prompt": [5] * 1001},
        400,
        "1,001 tokens; the limit is 1,000",
        "prompt",
        "context_length_exceeded",
    ),
    (
        {"prompt": "z" * 1001},
        400,
        "1,001 tokens; the limit is 1,000",
        "prompt",
        "context_length_exceeded",
    ),
    (
        {"prompt": "é漢" * 30_000},
        400,
        "at least 15,000 tokens; the limit is 1,000",
        "prompt",
        "context_length_exceeded",
    ),
    ({"model": "gpt-4"}, 404, "'gpt-4' is not served here", "model", "model_not_found"),
    ({"temperature": -1}, 400, "temperature is -1; the allowed range is [0, 2]", "temperature", ""),
    ({"temperature": 2.5}, 400, "is 2.5; the allowed range is [0, 2]", "temperature", ""),
    ({"temperature": "hot"}, 400, "temperature is 'hot'", "temperature", ""),
    ({"top_p": 2}, 400, "top_p is 2; the allowed range is (0, 1]", "top_p", ""),
    ({"top_p": 0}, 400, "top_p is 0; the allowed range is (0, 1]", "top_p", ""),
    ({"top_k": -2}, 400, "top_k is -2", "top_k", ""),
    ({"min_p": 1.5}, 400, "min_p is 1.5; the allowed range is [0, 1]", "min_p", ""),
    ({"seed": -2}, 400, "seed is -2", "seed", ""),
    ({"seed": 2**64}, 400, "seed is 18446744073709551616", "seed", ""),
    ({"seed": 10**400}, 400, "seed is 1000000", "seed", ""),
    ({"presence_penalty": 3}, 400, "range is [-2, 2]", "presence_penalty", ""),
    ({"frequency_penalty": -3}, 400, "range is [-2, 2]", "frequency_penalty", ""),
    ({"repetition_penalty": 0}, 400, "range is (0, 10]", "repetition_penalty", ""),
    ({"logit_bias": {"5": 101}}, 400, "101; the allowed range is [-100, 100]", "logit_bias", ""),
    ({"logit_bias": {"x": 1}}, 400, "key 'x', which is no token id", "logit_bias", ""),
    ({"logit_bias": {"320": 1}}, 400, "320; the vocab", "logit_bias", "invalid_request"),
    ({"max_tokens": -5}, 400, "max_tokens is -5; the allowed range is 1 to 500", "max_tokens", ""),
    ({"max_tokens": 0}, 400, "max_tokens is 0; the allowed range is 1 to 500", "max_tokens", ""),
    ({"max_tokens": 10**6}, 400, "1,000,000; the allowed range is 1 to 500", "max_tokens", ""),
    ({"max_tokens": 1.5}, 400, "max_tokens is 1.5", "max_tokens", ""),
    ({"n": 0}, 400, "n is 0; the allowed range is 1 to 4", "n", ""),
    ({"n": 5}, 400, "n is 5; the allowed range is 1 to 4", "n", ""),
    ({"stop": ["x"] * 1000}, 400, "1,000 strings; the limit is 16", "stop", ""),
    ({"stop": ["a", ""]}, 400, "stop[1] has 0 characters; the allowed range is 1", "stop", ""),
    ({"stop": "x" * 2000}, 400, "2,000 characters; the allowed range is 1 to 1,024", "stop", ""),
    ({"stop": 3}, 400, "stop is 3", "stop", ""),
    ({"logprobs": 21}, 400, "logprobs is 21; the allowed range is 0 to 20", "logprobs", ""),
    ({"suffix": "end"}, 400, "suffix is not supported", "suffix", "unsupported_parameter"),
    ({"best_of": 2}, 400, "best_of is not supported", "best_of", "unsupported_parameter"),
    ({"best_of": True}, 400, "best_of is not supported", "best_of", "unsupported_parameter"),
    ({"foo": 1}, 400, "unknown parameter: foo", "foo", "unknown_parameter"),
    ({"winnow": {"foo": 1}}, 400, "parameter: winnow.foo", "winnow.foo", "unknown_parameter"),
    ({"winnow": 3}, 400, "winnow is 3", "winnow", ""),
    (
        {"winnow": {"kv_budget": 8}},
        400,
        "kv_budget is 8; it must be above window_size, 8",
        "winnow.kv_budget",
        "",
    ),
    (
        {"winnow": {"kv_budget": 2**31}},
        400,
        "kv_budget is 2147483648; the allowed range is [1, 2147483647]",
        "winnow.kv_budget",
        "",
    ),
    (
        {"winnow": {"decode_budget": 5 * 10**9}},
        400,
        "decode_budget is 5000000000; the allowed range is [1, 2147483647]",
        "winnow.decode_budget",
        "",
    ),
    (
        {"winnow": {"decode_budget": 4}},
        400,
        "decode_budget is 4; it must be above window_size, 8",
        "winnow.decode_budget",
        "",
    ),
    (
        {"winnow": {"observed_layers": 3, "min_layer": 1}},
        400,
        "number 2 of 4. observed_layers 2 works",
        "winnow.observed_layers",
        "",
    ),
    ({"winnow": {"min_layer": 4}}, 400, "range is [0, 3]", "winnow.min_layer", ""),
    (
        {"winnow": {"method": "fastkv", "fixed_layer": 9}},
        400,
        "fixed_layer is 9; the allowed range is [0, 3]",
        "winnow.fixed_layer",
        "",
    ),
    ({"winnow": {"method": "best"}}, 400, "'best'; known are", "winnow.method", ""),
    ({"winnow": {"kernel_size": 4}}, 400, "must be odd", "winnow.kernel_size", ""),
    ({"winnow": {"threshold": "low"}}, 400, "threshold is 'low'", "winnow.threshold", ""),
    ({"winnow": {"select_tokens": []}}, 400, "select_tokens is []", "winnow.select_tokens", ""),
    (
        {"winnow": {"select_tokens": 513}},
        400,
        "select_tokens is 513; the operator's cap max_select_tokens is 512",
        "winnow.select_tokens",
        "",
    ),
    (
        {"winnow": {"method": "full"}},
        400,
        "select_tokens is unlimited with method full; the operator's cap max_select_tokens is 512",
        "winnow.method",
        "",
    ),
    (
        {"winnow": {"compression": "none"}},
        400,
        "kv_budget is unlimited with compression none; the operator's cap max_kv_budget is 600",
        "winnow.compression",
        "",
    ),
    (
        {"winnow": {"full_kv_below": True}},
        400,
        "kv_budget is unlimited with full_kv_below True; the operator's cap max_kv_budget is 600",
        "winnow.full_kv_below",
        "",
    ),
    (
        {"winnow": {"kv_budget": None}},
        400,
        "kv_budget is unlimited; the operator's cap max_kv_budget is 600",
        "winnow.kv_budget",
        "",
    ),
    ({"winnow": {"compression": "none"}}, 400, "kv_budget is unl", "winnow.compression", ""),
    ({"winnow": {"decode_budget": 701}}, 400, "cap max_dec", "winnow.decode_budget", ""),
    (
        {"stream_options": {"include_usage": True}},
        400,
        "only allowed when stream",
        "stream_options",
        "invalid_request",
    ),
    (
        {"stream": True, "stream_options": {"include_tokens": True}},
        400,
        "unknown parameter",
        "stream_options.include_tokens",
        "unknown_parameter",
    ),
    ({"store": "yes"}, 400, "store is 'yes'", "store", ""),
    ({"metadata": [1]}, 400, "metadata is [1]", "metadata", ""),
    ({"user": 5}, 400, "user is 5", "user", ""),
    ({"moderation": {"model": "m"}}, 400, "moder", "moderation", "unsupported_parameter"),
    ({"use_beam_search": True}, 400, "beam", "use_beam_search", "unsupported_parameter"),
    ({"length_penalty": 0.5}, 400, "length", "length_penalty", "unsupported_parameter"),
    ({"bad_words": ["x"]}, 400, "bad_words", "bad_words", "unsupported_parameter"),
    ({"guided_json": {"not": {}}}, 400, "guided_json cannot be", "guided_json", "invalid_grammar"),
    (
        {"response_format": {"type": "grammar"}},
        400,
        "response_format is of type",
        "response_format.type",
        "unsupported_parameter",
    ),
]


@pytest.mark.parametrize(
    ("changes", "status", "message", "param", "code"),
    COMPLETION_CASES,
    ids=[f"{idx}-{next(iter(case[0]))}" for idx, case in enumerate(COMPLETION_CASES)],
)
async def test_refuses_a_bad_completion_request(
    service: TestService, changes: dict[str, Any], status: int, message: str, param: str, code: str
) -> None:
    started_s = time.process_time()
    body = {"model": MODEL_NAME, "prompt": "the fox"} | changes
    response = await service.http.post(COMPLETIONS, json=body)
    assert time.process_time() - started_s < 1
    await assert_refused(response, status, message, param, code or "invalid_value")


MESSAGES = [{"role": "user", "content": "hi"}]
CHAT_CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"messages": []}, "at least 1", "messages", "invalid_request"),
    ({"messages": "hi"}, "messages is 'hi'", "messages", ""),
    ({"messages": [{"role": "user"}]}, "has no content", "messages[0].content", "invalid_request"),
    ({"messages": [{"content": "a"}]}, "missing", "messages[0].role", "invalid_request"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "'bot'; known", "messages[0].role", ""),
    (
        {"messages": [*MESSAGES, {"role": "user", "content": 5}]},
        "messages[1].content is 5",
        "messages[1].content",
        "",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
        "unknown parameter",
        "messages[0].tool_calls",
        "unknown_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
        "messages[0].content[0] is of type 'image_url', which is not supported by Winnow",
        "messages[0].content[0]",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
        "missing",
        "messages[0].content[0].type",
        "invalid_request",
    ),
    (
        {"messages": [{"role": "user", "content": "z" * 1200}]},
        "tokens; the limit is 1,000",
        "messages",
        "context_length_exceeded",
    ),
    ({"max_completion_tokens": -1}, "max_completion_tokens is -1", "max_completion_tokens", ""),
    ({"max_tokens": 501}, "max_tokens is 501", "max_tokens", ""),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "give one", "max_tokens", ""),
    ({"logprobs": True, "top_logprobs": 21}, "range is 0 to 20", "top_logprobs", ""),
    ({"top_logprobs": 2}, "logprobs is not true", "top_logprobs", ""),
    ({"logprobs": 2}, "logprobs is 2", "logprobs", ""),
    ({"functions": [{}]}, "functions is not", "functions", "unsupported_parameter"),
    (
        {"response_format": {"type": "structural_tag"}},
        "response_format is of type",
        "response_format.type",
        "unsupported_parameter",
    ),
    ({"audio": {}}, "audio is not", "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "modalities", "unsupported_parameter"),
    ({"reasoning_effort": 3}, "reasoning_effort is 3", "reasoning_effort", ""),
    ({"web_search_options": {}}, "web_s", "web_search_options", "unsupported_parameter"),
    ({"chat_template": "{{ x }}"}, "chat_t", "chat_template", "unsupported_parameter"),
    ({"prompt": "a"}, "unknown parameter: prompt", "prompt", "unknown_parameter"),
]


@pytest.mark.parametrize(("changes", "message", "param", "code"), CHAT_CASES)
async def test_refuses_a_bad_chat_request(
    service: TestService, changes: dict[str, Any], message: str, param: str, code: str
) -> None:
    body = {"model": MODEL_NAME, "messages": MESSAGES} | changes
    response = await service.http.post(CHAT, json=body)
    await assert_refused(response, 400, message, param, code or "invalid_value")


BODIES: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
    (b'{"model": "tiny", "prompt": "\xff"}', "not UTF-8: byte 0xff at position 29"),
    (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
    (b'{"temperature": NaN}', "it has NaN"),
    (b'{"temperature": -Infinity}', "it has -Infinity"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    (b"[" * 100_000, "not JSON that can be read"),
    (b"[1]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=[text for _, text in BODIES])
async def test_refuses_a_body_that_is_no_json_object(
    service: TestService, body: bytes, message: str
) -> None:
    response = await service.http.post(COMPLETIONS, content=body, headers=JSON)
    await assert_refused(response, 400, message, None, "invalid_request")


@pytest.mark.parametrize("missing", ["model", "prompt"])
async def test_names_a_missing_parameter(service: TestService, missing: str) -> None:
    body = {"model": MODEL_NAME, "prompt": "a"}
    del body[missing]
    response = await service.http.post(COMPLETIONS, json=body)
    await assert_refused(response, 400, f"missing parameter: {missing}", missing, "invalid_request")


async def test_refuses_a_body_over_the_limit_by_its_announced_length(service: TestService) -> None:
    body = json.dumps({"model": MODEL_NAME, "prompt": "a" * MAX_BODY_BYTES}).encode()
    response = await service.http.post(COMPLETIONS, content=body, headers=JSON)
    message = f"body has {len(body):,} bytes; the limit is 200,000"
    await assert_refused(response, 413, message, None, "body_too_large")


async def test_refuses_a_body_over_the_limit_while_it_streams_in(service: TestService) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 10_000

    response = await service.http.post(COMPLETIONS, content=endless(), headers=JSON)
    message = "body has more than 200,000 bytes; the limit is 200,000"
    await assert_refused(response, 413, message, None, "body_too_large")


async def test_takes_the_values_of_unsupported_parameters_that_ask_for_nothing(
    service: TestService,
) -> None:
    body = {
        "model": MODEL_NAME,
        "messages": MESSAGES,
        "max_tokens": 1,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "temperature": None,
        "stop": None,
    }
    assert (await service.http.post(CHAT, json=body)).status_code == 200


async def test_refuses_prompt_and_answer_that_exceed_the_context(
    model_path: Path, redis_url: str
) -> None:
    async with running_service(model_path, redis_url, max_new_tokens=8192) as service:
        body = {"model": MODEL_NAME, "prompt": [5] * 4000, "max_tokens": 4193}
        response = await service.http.post(COMPLETIONS, json=body)
        message = (
            "prompt of 4,000 tokens and max_tokens of 4,193 make 8,193; the model's limit is 8,192"
        )
        await assert_refused(response, 400, message, "max_tokens", "context_length_exceeded")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v2/foo", 404, "not_found"), ("GET", COMPLETIONS, 405, "method_not_allowed")],
)
async def test_unknown_paths_are_answered_in_the_same_format(
    service: TestService, method: str, path: str, status: int, code: str
) -> None:
    response = await service.http.request(method, path)
    await assert_refused(response, status, f"{method} {path}", None, code)


async def test_goes_on_serving_after_bad_input(service: TestService) -> None:
    for body, _ in BODIES:
        await service.http.post(COMPLETIONS, content=body, headers=JSON)
    await assert_serves(service)
    metrics = (await service.admin.get("/metrics")).text
    assert value(metrics, "winnow_requests_refused_total", reason="invalid_request") > 0


async def test_a_client_that_leaves_in_mid_body_is_no_error_of_ours(
    service: TestService, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n")
    writer.write(b"Content-Type: application/json\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    refused = "winnow_requests_refused_total"
    async with asyncio.timeout(SOON_S):
        while value((await service.admin.get("/metrics")).text, refused, reason="cancelled") < 1:
            pass
    assert "unexpected error" not in caplog.text
