"""Requests read without a server: whatever JSON comes, it is taken or refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.body import Body
from services.gateway.json_text import parse_object
from services.gateway.rest.bodies import ChatRequest, CompletionRequest
from services.gateway.rest.messages_bodies import CountTokensRequest, MessagesRequest
from services.gateway.rest.requests import RequestReader
from services.gateway.rest.responses_bodies import ResponsesRequest
from services.gateway.rest.translate_messages import count_tokens, read_messages
from services.gateway.rest.translate_responses import read_responses
from services.gateway.rest.winnow_options import WinnowOptions
from winnow.errors import InvalidRequest

NUMBERS = st.integers() | st.floats(allow_nan=False) | st.sampled_from([10**400, 1e308, -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
USER = [{"role": "user", "content": "fox"}]
WINNOW = st.dictionaries(st.sampled_from(sorted(WinnowOptions.model_fields)), SCALARS, max_size=3)


def bodies(cls: type[CompletionRequest | ChatRequest]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*cls.model_fields, "tools", "suffix", "unknown"])
    return st.dictionaries(names, JSON | WINNOW, max_size=4)


@given(changes=bodies(CompletionRequest))
def test_any_completion_body_is_taken_or_refused(
    reader: RequestReader, changes: dict[str, Any]
) -> None:
    body = {"model": "tiny", "prompt": "the fox"} | changes
    try:
        asked = reader.completion(parse_object(json.dumps(body).encode(), "body"))
    except InvalidRequest as error:
        assert error.message
    else:
        assert asked.generation.prompts


@given(changes=bodies(ChatRequest))
def test_any_chat_body_is_taken_or_refused(reader: RequestReader, changes: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}]} | changes
    try:
        asked = reader.chat(parse_object(json.dumps(body).encode(), "body"))
    except InvalidRequest as error:
        assert error.message
    else:
        assert len(asked.generation.prompts) == 1


@pytest.mark.parametrize(
    ("read", "cls", "usual"),
    [
        (read_responses, ResponsesRequest, {"input": "fox"}),
        (read_messages, MessagesRequest, {"messages": USER, "max_tokens": 4}),
        (count_tokens, CountTokensRequest, {"messages": USER}),
    ],
)
def test_any_body_of_another_api_is_taken_or_refused(
    reader: RequestReader, read: Any, cls: type[Body], usual: dict[str, Any]
) -> None:
    names = st.sampled_from([*cls.model_fields, "prompt", "unknown"])

    @given(changes=st.dictionaries(names, JSON | WINNOW, max_size=4))
    @settings(max_examples=60)
    def ask(changes: dict[str, Any]) -> None:
        body = {"model": "tiny"} | usual | changes
        try:
            assert read(reader, parse_object(json.dumps(body).encode(), "body"))
        except InvalidRequest as error:
            assert error.message

    ask()


@given(body=st.binary(max_size=40) | st.text('{}[]",:\\ud8aN1e.-', max_size=20).map(str.encode))
def test_any_bytes_are_a_json_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body, "body"), dict)
    except InvalidRequest as error:
        assert "body" in error.message


def test_a_request_without_seed_gets_a_random_one(reader: RequestReader) -> None:
    body = {"model": "tiny", "prompt": "a"}
    seeds = {reader.completion(body).generation.sampling.seed for _ in range(3)}
    assert len(seeds) == 3
    assert reader.completion(body | {"seed": 5}).generation.sampling.seed == 5


def test_defaults_are_those_of_openai(reader: RequestReader) -> None:
    asked = reader.completion({"model": "tiny", "prompt": "a"})
    sampling = asked.generation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.num_logprobs) == (1, 1, None)
    assert (asked.stream, asked.include_usage, asked.generation.num_choices) == (False, False, 1)
    assert asked.generation.prompts[0].max_tokens == 16
