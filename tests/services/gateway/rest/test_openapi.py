"""What /openapi.json says is what the service takes and gives: schemathesis asks it all of it."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode
from starlette.routing import Route

from services.gateway.access.keys import entry_text, new_key
from services.gateway.rest.api import create_api
from tests.services.gateway.service import MODEL_NAME, TestService, running_service

pytestmark = pytest.mark.asyncio(loop_scope="module")

Operation: TypeAlias = "schemathesis.APIOperation[Any, Any, Any, Any]"

NUM_EXAMPLES = 40
NUM_TRANSLATED_EXAMPLES = 15  # of APIs whose requests become chats
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
NEEDED = {
    "/v1/completions": ["prompt"],
    "/v1/chat/completions": ["messages"],
    "/tokenize": ["prompt"],
    "/detokenize": ["tokens"],
    "/v1/responses": ["input"],
    "/v1/messages": ["messages", "max_tokens"],
    "/v1/messages/count_tokens": ["messages"],
}
# What is needed although it may be left out.
SELDOM: dict[str, dict[str, Any]] = {"/tokenize": {"prompt": "a"}}
FULL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "logprobs": 2, "n": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "logprobs": True,
        "top_logprobs": 2,
        "stop_token_ids": [*range(4, 100)],
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "metadata": {"a": "b"},
    },
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "stop_sequences": ["zz"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model_path: Path, redis_url: str) -> AsyncIterator[TestService]:
    async with running_service(model_path, redis_url, max_new_tokens=8) as service:
        yield service
        await service.until_idle()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(service: TestService) -> dict[str, Any]:
    return dict((await service.http.get("/openapi.json")).json())


async def test_it_is_a_document_of_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert "security" not in document or document["security"] == []
    schemathesis.openapi.from_dict(document).validate()


async def test_with_keys_it_says_so_and_asks_for_one(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    key, entry = new_key("reader")
    (tmp_path / "keys.yaml").write_text(entry_text(entry))
    keys: dict[str, Any] = {"api_keys_file": tmp_path / "keys.yaml", "num_workers": 0}
    async with running_service(model_path, redis_url, **keys) as service:
        assert (await service.http.get("/openapi.json")).status_code == 401
        bearer = {"authorization": f"Bearer {key}"}
        guarded = (await service.http.get("/openapi.json", headers=bearer)).json()
    assert guarded["security"] == [{"key": []}]
    assert guarded["paths"]["/ready"]["get"]["security"] == []


async def test_every_route_is_described(service: TestService, document: dict[str, Any]) -> None:
    served = {
        route.path.replace(":path", "")
        for route in create_api(service.gateway).routes
        if isinstance(route, Route) and route.path not in ("/", "/openapi.json")
    }
    assert served == document["paths"].keys()


def ask_all(operation: Operation, url: str, mode: GenerationMode) -> set[int]:
    """The statuses of the answers to what is drawn; raises for an answer that is wrong.

    What should be taken names the model that is served, and seldom asks for much at once.
    """
    statuses = set()
    translated = operation.path.startswith(("/v1/responses", "/v1/messages"))

    @given(case=operation.as_strategy(generation_mode=mode), num_options=st.integers(0, 2))
    @settings(
        max_examples=NUM_TRANSLATED_EXAMPLES if translated else NUM_EXAMPLES,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any, num_options: int) -> None:
        if mode is GenerationMode.POSITIVE and operation.method == "post":
            names = [name for name in NEEDED[operation.path] if name in case.body]
            needed = {name: case.body.pop(name) for name in names}
            if "max_tokens" in needed:
                needed["max_tokens"] = 2
            elif "messages" in needed:
                needed["messages"] = [said(message) for message in needed["messages"]]
            options = sorted(case.body.items())[:num_options]
            seldom = SELDOM.get(operation.path, {})
            case.body = seldom | needed | dict(options) | {"model": MODEL_NAME}
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    ask()
    return statuses


def said(message: dict[str, Any]) -> dict[str, Any]:
    """A message with content, and with a call's id if it is a result.

    What only an assistant's has is left out of others.
    """
    calls = ("tool_calls", "tool_call_id")
    role, content = message.get("role"), message.get("content") or "?"
    if role == "assistant":
        return {name: value for name, value in message.items() if name not in calls}
    own = ("refusal", "reasoning", "reasoning_content", *calls)
    kept = {name: value for name, value in message.items() if name not in own}
    return kept | {"content": content} | ({"tool_call_id": "1"} if role == "tool" else {})


def operations(document: dict[str, Any]) -> list[Operation]:
    found: Iterable[Any] = schemathesis.openapi.from_dict(document).get_all_operations()
    return [one.ok() for one in found]


async def test_what_is_described_is_answered_as_described(
    service: TestService, document: dict[str, Any]
) -> None:
    for operation in operations(document):
        asked = asyncio.to_thread(ask_all, operation, service.url, GenerationMode.POSITIVE)
        assert await asked & {200, 404}, operation.path  # 404: another model's name
    await service.until_idle()


async def test_what_is_not_described_is_refused(
    service: TestService, document: dict[str, Any]
) -> None:
    with_bodies = [one for one in operations(document) if one.method == "post"]
    assert len(with_bodies) == 7
    for operation in with_bodies:
        asked = asyncio.to_thread(ask_all, operation, service.url, GenerationMode.NEGATIVE)
        assert max(await asked) < 500, operation.path
    await service.until_idle()


@pytest.mark.parametrize("path", FULL)
async def test_a_full_answer_is_as_described(
    service: TestService, document: dict[str, Any], path: str
) -> None:
    """Every optional part, which drawn requests seldom ask for."""
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    for stream in (False, True):
        most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        body = FULL[path] | {"model": MODEL_NAME, most: 3, "stream": stream}
        case = operation.Case(body=body, media_type="application/json")
        response = await asyncio.to_thread(case.call, base_url=service.url, timeout=60)
        assert response.status_code == 200
        case.validate_response(response, checks=CHECKS)
