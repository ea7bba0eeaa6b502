"""What asks for nothing is forgiven wherever it is sent; what asks for something is refused."""

from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletionMessage

from tests.services.gateway.service import MODEL_NAME, TestService

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOTHING: list[Any] = [None, [], {}, ""]
USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "well"}


async def ask(
    service: TestService, path: str = "/v1/chat/completions", **body: Any
) -> httpx.Response:
    asked: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 2, "temperature": 0}
    if path == "/v1/completions":
        asked["prompt"] = "hi"
    else:
        asked["messages"] = [USER]
    return await service.http.post(path, json=asked | body)


async def prompt_tokens(service: TestService, *messages: dict[str, Any]) -> int:
    response = await ask(service, messages=list(messages))
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens"])


async def test_a_conversation_goes_round_as_the_official_client_dumps_it(
    service: TestService,
) -> None:
    messages: list[Any] = [USER]
    for dump in (
        lambda message: message,
        ChatCompletionMessage.model_dump,
        ChatCompletionMessage.to_dict,
        lambda message: message.model_dump(exclude_unset=False, exclude_none=False),
        lambda message: message.model_dump(exclude_none=True),
    ):
        answer = await service.openai.chat.completions.create(
            model=MODEL_NAME, messages=messages, max_tokens=3
        )
        messages += [dump(answer.choices[0].message), USER]
    full = ChatCompletionMessage(role="assistant", content="well").model_dump()
    assert {"refusal", "annotations", "audio", "function_call", "tool_calls"} <= set(full)
    expected = await prompt_tokens(service, USER, SAID, USER)
    assert await prompt_tokens(service, USER, full, USER) == expected


@pytest.mark.parametrize(
    "field",
    [
        *("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id", "name"),
        *("reasoning_content", "reasoning", "reasoning_details", "cache_control", "anything"),
    ],
)
async def test_empty_fields_of_a_message_are_forgiven(service: TestService, field: str) -> None:
    expected = await prompt_tokens(service, USER, SAID)
    for nothing in NOTHING:
        is_text = field in ("refusal", "name", "reasoning_content", "reasoning")
        if is_text and nothing not in (None, ""):
            continue
        for message in ({**USER, field: nothing}, {**SAID, field: nothing}):
            rest = [SAID] if message["role"] == "user" else []
            before = [] if message["role"] == "user" else [USER]
            assert await prompt_tokens(service, *before, message, *rest) == expected


async def test_empty_fields_of_a_part_are_forgiven_and_its_cache_control_too(
    service: TestService,
) -> None:
    expected = await prompt_tokens(service, USER)
    mores: tuple[dict[str, Any], ...] = (
        {"annotations": []},
        {"image_url": None},
        {"cache_control": None},
        {"cache_control": {"type": "ephemeral"}},
    )
    for more in mores:
        part = {"type": "text", "text": "hi"} | more
        assert await prompt_tokens(service, {"role": "user", "content": [part]}) == expected
    empty = [{"type": "text", "text": "hi"}, {"type": "text", "text": None}, {"type": "text"}]
    assert await prompt_tokens(service, {"role": "user", "content": empty}) == expected
    marked = USER | {"cache_control": {"type": "ephemeral"}}
    assert await prompt_tokens(service, marked) == expected


@pytest.mark.parametrize("content", [None, "", [], ...])
async def test_an_assistant_may_have_said_nothing(service: TestService, content: Any) -> None:
    message = {"role": "assistant", "tool_calls": None}
    message |= {} if content is ... else {"content": content}
    expected = await prompt_tokens(service, USER, {"role": "assistant", "content": ""}, USER)
    assert await prompt_tokens(service, USER, message, USER) == expected


async def test_an_assistants_refusal_is_what_it_said(service: TestService) -> None:
    refusal = {"role": "assistant", "content": None, "refusal": "well"}
    expected = await prompt_tokens(service, USER, SAID, USER)
    assert await prompt_tokens(service, USER, refusal, USER) == expected


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        *({"anything": nothing} for nothing in NOTHING),
        {"stream_options": None},
        {"stream_options": {}},
        {"stream_options": {"include_usage": None}},
        {"stream_options": {"include_usage": False, "anything": []}},
        {"stop": None},
        {"stop": []},
        {"stop": ""},
        {"stop_token_ids": []},
        {"logit_bias": {}},
        {"user": ""},
        {"winnow": None},
        {"winnow": {}},
        {"winnow": {"select_tokens": None, "method": None, "anything": None}},
        {"winnow": {"full_kv_below": None, "threshold": None, "latest_layer": None}},
        {"min_tokens": None, "skip_special_tokens": None, "include_stop_str_in_output": None},
        {"tools": None, "metadata": None, "suffix": None},
    ],
)
async def test_what_asks_for_nothing_is_forgiven(
    service: TestService, path: str, body: dict[str, Any]
) -> None:
    response = await ask(service, path, **body)
    expected = await ask(service, path)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == expected.json()["choices"]


async def test_streams_forgive_it_too(service: TestService) -> None:
    options: dict[str, Any] = {"include_usage": None, "include_obfuscation": False, "anything": {}}
    response = await ask(service, stream=True, stream_options=options)
    assert response.status_code == 200
    assert '"usage"' not in response.text


async def test_tokenize_forgives_it_too(service: TestService) -> None:
    full = ChatCompletionMessage(role="assistant", content="well").model_dump()
    body: dict[str, Any] = {
        "messages": [USER, full],
        "prompt": None,
        "anything": None,
        "chat_template_kwargs": {},
    }
    assert (await service.http.post("/tokenize", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"anything": 0}, "anything"),
        ({"anything": False}, "anything"),
        ({"anything": [None]}, "anything"),
        ({"stream": True, "stream_options": {"anything": True}}, "stream_options.anything"),
        ({"winnow": {"anything": 1}}, "winnow.anything"),
        ({"messages": [USER | {"tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ({"messages": [USER, SAID | {"audio": {"id": "1"}}]}, "messages[1].audio"),
        ({"messages": [USER, SAID | {"annotations": [{}]}]}, "messages[1].annotations"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
    ],
)
async def test_what_asks_for_something_is_refused_by_name(
    service: TestService, body: dict[str, Any], param: str
) -> None:
    response = await ask(service, **body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "unknown_parameter",
        param,
    )


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("message", [{}, {"content": None}])
async def test_only_an_assistant_may_have_said_nothing(
    service: TestService, role: str, message: dict[str, Any]
) -> None:
    response = await ask(service, messages=[{"role": role} | message])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content"
