"""Whatever a client sends gets an answer or one typed error, and leaves nothing behind."""

import asyncio
import json
import string
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.grpc.requests import request_from_proto
from tests.deadlines import SOON_S
from tests.services.gateway.service import MODEL_NAME, TestService
from winnow.errors import ERROR_CODES, InvalidRequest, WinnowError
from winnow.v1 import inference_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "stream"),
    *("seed", "logprobs", "echo", "logit_bias", "presence_penalty", "user", "best_of", "suffix"),
    *("stream_options", "winnow", "top_k", "min_p", "ignore_eos", "tools", "top_logprobs"),
    *("input", "instructions", "max_output_tokens", "include", "text", "tool_choice"),
    *("system", "stop_sequences", "thinking", "output_config"),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 70)
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=12)
INNER_FIELDS = (
    *("role", "content", "kv_budget", "method", "include_usage", "format", "type", "text"),
    *("name", "call_id", "arguments", "output", "summary", "id", "tool_use_id", "thinking"),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from((*FIELDS, *INNER_FIELDS)) | st.text(string.printable, max_size=6),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
PATHS = st.sampled_from(
    (
        *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
        *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
    )
)
SAID = [{"role": "user", "content": "a b"}]


def usual(path: str) -> dict[str, Any]:
    """A request that is answered."""
    own: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a b", "max_tokens": 2},
        "/v1/chat/completions": {"messages": SAID, "max_tokens": 2},
        "/v1/responses": {"input": SAID, "max_output_tokens": 2},
        "/v1/messages": {"messages": SAID, "max_tokens": 2},
        "/v1/messages/count_tokens": {"messages": SAID},
        "/tokenize": {"prompt": "a b"},
        "/detokenize": {"tokens": [5]},
    }
    return {"model": MODEL_NAME, **own[path]}


ITEM_TYPES = st.sampled_from(
    (
        *("message", "function_call", "function_call_output", "reasoning", "text", "input_text"),
        *("tool_use", "tool_result", "thinking", "redacted_thinking", "image"),
    )
)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {"type": ITEM_TYPES},
        optional={name: SCALARS | VALUES for name in INNER_FIELDS if name != "type"},
    ),
    max_size=3,
)


def drawn_requests() -> list[tuple[str, bytes]]:
    """Paths and bodies: usual ones with a few fields changed, and junk."""
    drawn: list[tuple[str, bytes]] = []

    @given(path=PATHS, changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
    @settings(max_examples=200, derandomize=True)
    def draw_changed(path: str, changes: dict[str, Any]) -> None:
        drawn.append((path, json.dumps(usual(path) | changes).encode()))

    @given(role=st.sampled_from(("user", "assistant")), items=ITEMS)
    @settings(max_examples=30, derandomize=True)
    def draw_items(role: str, items: list[dict[str, Any]]) -> None:
        said = [*SAID, {"role": role, "content": items}]
        for path, changes in (
            ("/v1/responses", {"input": items}),
            ("/v1/responses", {"input": said}),
            ("/v1/messages", {"messages": said}),
        ):
            drawn.append((path, json.dumps(usual(path) | changes).encode()))

    @given(path=PATHS, body=st.binary(max_size=60))
    @settings(max_examples=100, derandomize=True)
    def draw_junk(path: str, body: bytes) -> None:
        drawn.append((path, body))

    draw_changed()
    draw_items()
    draw_junk()
    return drawn


async def test_whatever_comes_over_rest_has_an_answer(service: TestService) -> None:
    requests = drawn_requests()
    for path, body in requests:
        async with asyncio.timeout(SOON_S):
            response = await service.http.post(
                path, content=body, headers={"content-type": "application/json"}
            )
        if response.status_code != 200:
            error = response.json()["error"]
            assert 400 <= response.status_code < 500, (path, body, error)
            assert error["code"] in ERROR_CODES, (path, body)
            is_message = path.startswith("/v1/messages")
            assert (response.json().get("type") == "error") == is_message, (path, body)
            assert error["message"]
    assert len(requests) >= 200
    await service.until_idle()


async def test_whatever_comes_over_grpc_is_an_ask_or_an_error(service: TestService) -> None:
    read = 0

    @given(message=st.binary(max_size=80), more=st.binary(max_size=20))
    @settings(max_examples=1500, derandomize=True)
    def ask(message: bytes, more: bytes) -> None:
        nonlocal read
        usual = pb.CompleteRequest(model=MODEL_NAME, text="a").SerializeToString()
        for data in (message, usual + more):
            try:
                request = pb.CompleteRequest.FromString(data)
            except DecodeError:
                continue
            read += 1
            try:
                request_from_proto(service.gateway, request)
            except WinnowError as error:
                assert isinstance(error, InvalidRequest), error

    ask()
    assert read > 100
