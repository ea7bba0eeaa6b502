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
)
NUMBERS = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 70)
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from((*FIELDS, "role", "content", "kv_budget", "method", "include_usage"))
            | st.text(string.printable, max_size=6),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
USUAL: dict[str, Any] = {"model": MODEL_NAME, "prompt": "a b", "max_tokens": 2}
PATHS = st.sampled_from(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))


def drawn_requests() -> list[tuple[str, bytes]]:
    """Paths and bodies: usual ones with a few fields changed, and junk."""
    drawn: list[tuple[str, bytes]] = []

    @given(path=PATHS, changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
    @settings(max_examples=200, derandomize=True)
    def draw_changed(path: str, changes: dict[str, Any]) -> None:
        drawn.append((path, json.dumps(USUAL | changes).encode()))

    @given(path=PATHS, body=st.binary(max_size=60))
    @settings(max_examples=100, derandomize=True)
    def draw_junk(path: str, body: bytes) -> None:
        drawn.append((path, body))

    draw_changed()
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
