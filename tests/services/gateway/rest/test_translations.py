"""/v1/responses and /v1/messages through the official clients, as agents call them."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import pytest_asyncio
from openai.types.responses import Response

from services.gateway.access.keys import entry_text, new_key
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from winnow.errors import PrefillFailed

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY: dict[str, Any] = {"temperature": 0}
USER = {"role": "user", "content": "the quick brown fox"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claude(service: TestService) -> AsyncIterator[anthropic.AsyncAnthropic]:
    client = anthropic.AsyncAnthropic(base_url=service.url, api_key="none", max_retries=0)
    async with client:
        yield client


async def chat(service: TestService, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"model": MODEL_NAME, "messages": list(messages), "max_tokens": 6, "ignore_eos": True}
    answer = await service.http.post("/v1/chat/completions", json=body | GREEDY | more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def chat_text(service: TestService, *messages: dict[str, Any], **more: Any) -> str:
    return str((await chat(service, *messages, **more))["choices"][0]["message"]["content"])


async def responses(service: TestService, **body: Any) -> httpx.Response:
    base = {"model": MODEL_NAME, "max_output_tokens": 6, "ignore_eos": True}
    return await service.http.post("/v1/responses", json=base | GREEDY | body)


async def messages(service: TestService, **body: Any) -> httpx.Response:
    base = {"model": MODEL_NAME, "max_tokens": 6, "ignore_eos": True, "messages": [USER]}
    return await service.http.post("/v1/messages", json=base | GREEDY | body)


async def test_a_response_is_what_the_chat_would_say(service: TestService) -> None:
    system = {"role": "system", "content": "be brief"}
    answer = await service.openai.responses.create(
        model=MODEL_NAME,
        instructions="be brief",
        input="the quick brown fox",
        max_output_tokens=6,
        extra_body={"ignore_eos": True},
        **GREEDY,
    )
    assert answer.output_text == await chat_text(service, system, USER)
    assert (answer.status, answer.model) == ("incomplete", MODEL_NAME)
    assert answer.usage is not None and answer.usage.output_tokens == 6
    assert answer.id.startswith("resp_")
    Response.model_validate(answer.to_dict())


async def test_a_response_is_streamed(service: TestService) -> None:
    whole = (await responses(service, input="the fox", stop=["zzz"])).json()
    stream = await service.openai.responses.create(
        model=MODEL_NAME,
        input="the fox",
        max_output_tokens=6,
        stream=True,
        extra_body={"ignore_eos": True},
        **GREEDY,
    )
    events = [event async for event in stream]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.incomplete"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert events[-1].response.usage.total_tokens == whole["usage"]["total_tokens"]
    assert events[-1].response.id == events[0].response.id


async def test_what_codex_sends_is_taken(service: TestService) -> None:
    body = {
        "instructions": "You are a coding agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "<permissions>"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "the quick brown fox"}],
            },
            {
                "type": "reasoning",
                "summary": [],
                "content": None,
                "encrypted_content": "gAAAA",
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "well", "annotations": []}],
                "phase": "commentary",
            },
            {"type": "message", "role": "user", "content": "hi"},
        ],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "1"},
        "service_tier": None,
    }
    answer = await responses(service, **body)
    assert answer.status_code == 200, answer.text
    expected = await chat_text(
        service,
        {"role": "system", "content": "You are a coding agent.\n\n<permissions>"},
        USER,
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "hi"},
    )
    assert answer.json()["output"][0]["content"][0]["text"] == expected
    assert answer.json()["store"] is False


async def test_an_answer_goes_back_as_the_official_client_dumps_it(service: TestService) -> None:
    first = await service.openai.responses.create(
        model=MODEL_NAME, input="the fox", max_output_tokens=4
    )
    text = first.output_text
    said = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": text}, USER]
    tokens = (await chat(service, *said))["usage"]["prompt_tokens"]
    for dumped in (
        first.output,
        [item.model_dump() for item in first.output],
        [item.to_dict() for item in first.output],
    ):
        again = await service.openai.responses.create(
            model=MODEL_NAME,
            input=[{"role": "user", "content": "the fox"}, *dumped, USER],  # type: ignore[list-item]
            max_output_tokens=2,
        )
        assert again.usage is not None and again.usage.input_tokens == tokens


async def test_a_response_repeats_what_was_asked(service: TestService) -> None:
    effort = {"effort": "low", "summary": "auto"}
    answer = await responses(
        service,
        **{"input": "a", "metadata": {"run": "7"}, "top_p": 0.5, "user": "me", "seed": 3},
        **{"cache_salt": "s", "reasoning": effort},
    )
    told = answer.json()
    assert told["reasoning"] == {"effort": "low", "summary": None}
    assert (told["metadata"], told["top_p"], told["user"]) == ({"run": "7"}, 0.5, "me")
    assert (told["max_output_tokens"], told["tools"], told["tool_choice"]) == (6, [], "auto")
    assert told["usage"]["winnow"]["ttft_s"] > 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["all"]}, "include"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [USER, {"type": "computer_call"}]}, "input[1]"),
        ({"input": [USER, USER | {"content": [{"type": "input_image"}]}]}, "input[1].content[0]"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**9}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"winnow": {"kv_budget": -1}}, "winnow.kv_budget"),
        ({"model": "other"}, "model"),
        ({"metadata": {f"k{idx}": "v" for idx in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": [1]}}, "metadata"),
        ({"model": "m" * 257}, "model"),
        ({"user": "u" * 513}, "user"),
        ({"prompt_cache_key": "u" * 513}, "prompt_cache_key"),
        ({"safety_identifier": "u" * 513}, "safety_identifier"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_bad_response_is_refused_in_the_clients_own_names(
    service: TestService, changes: dict[str, Any], param: str
) -> None:
    answer = await responses(service, **({"input": "a"} | changes))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404 if param == "model" else 400, param)
    if param.startswith(("input", "max_output")):
        assert "messages" not in error["message"] and "completion" not in error["message"]


async def test_a_message_is_what_the_chat_would_say(
    service: TestService, claude: anthropic.AsyncAnthropic
) -> None:
    answer = await claude.messages.create(
        model=MODEL_NAME,
        max_tokens=6,
        system="be brief",
        messages=[{"role": "user", "content": "the quick brown fox"}],
        extra_body={"ignore_eos": True, **GREEDY},
    )
    system = {"role": "system", "content": "be brief"}
    chatted = await chat(service, system, USER)
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == chatted["choices"][0]["message"]["content"]
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert answer.usage.input_tokens == chatted["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == 6
    assert answer.id.startswith("msg_") and answer._request_id == answer.id


async def test_a_message_is_streamed(
    service: TestService, claude: anthropic.AsyncAnthropic
) -> None:
    whole = (await messages(service)).json()
    manager = claude.messages.stream(
        model=MODEL_NAME,
        max_tokens=6,
        messages=[{"role": "user", "content": "the quick brown fox"}],
        extra_body={"ignore_eos": True, **GREEDY},
    )
    async with manager as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert len(texts) > 1
    assert "".join(texts) == whole["content"][0]["text"]
    assert final.usage.output_tokens == 6
    assert final.stop_reason == whole["stop_reason"] == "max_tokens"


async def test_what_claude_code_sends_is_taken(service: TestService) -> None:
    def block(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}

    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=fa690;"},
            block("You are Claude Code."),
            block("Be brief."),
        ],
        "messages": [
            {"role": "user", "content": [block("<system-reminder>"), block("the fox")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "", "signature": "Ep"},
                    {"type": "redacted_thinking", "data": "Em"},
                    block("well"),
                ],
            },
            {"role": "user", "content": [block("hi")]},
            {"role": "user", "content": "there"},
        ],
        "tools": [],
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stop_sequences": [],
        "stream": False,
    }
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    base = {"model": MODEL_NAME, "max_tokens": 6, "ignore_eos": True}
    answer = await service.http.post(
        "/v1/messages?beta=true", json=base | GREEDY | body, headers=headers
    )
    assert answer.status_code == 200, answer.text
    expected = await chat_text(
        service,
        {"role": "system", "content": "You are Claude Code.\n\nBe brief."},
        {"role": "user", "content": "<system-reminder>\nthe fox"},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "hi\nthere"},
    )
    assert answer.json()["content"][0]["text"] == expected
    del body["stream"], body["stop_sequences"]
    counted = await service.http.post(
        "/v1/messages/count_tokens?beta=true", json={"model": MODEL_NAME, **body}
    )
    assert counted.json() == {"input_tokens": answer.json()["usage"]["input_tokens"]}


async def test_a_begun_answer_goes_on(service: TestService) -> None:
    begun = {"role": "assistant", "content": "jumps over"}
    options = {"continue_final_message": True}
    answer = await messages(service, messages=[USER, begun])
    assert answer.json()["content"][0]["text"] == await chat_text(service, USER, begun, **options)


async def test_stop_sequences_stop(service: TestService) -> None:
    text = (await messages(service)).json()["content"][0]["text"]
    answer = (await messages(service, stop_sequences=[text[3:6]])).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", text[3:6])
    assert answer["content"][0]["text"] == text[: text.index(text[3:6])]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"container": "c1"}, "container"),
        ({"mcp_servers": [{"name": "a"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "compact"}]}}, "context_management"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [USER | {"content": [{"type": "tool_result", "content": "a"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"messages": []}, "messages"),
        ({"messages": [], "system": "be brief"}, "messages"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"model": "other"}, "model"),
    ],
    ids=str,
)
async def test_a_bad_message_is_refused_in_anthropics_form(
    service: TestService, changes: dict[str, Any], param: str
) -> None:
    answer = await messages(service, **changes)
    body = answer.json()
    is_model = param == "model"
    assert answer.status_code == (404 if is_model else 400)
    assert (body["type"], body["error"]["param"]) == ("error", param)
    kind = "not_found_error" if is_model else "invalid_request_error"
    assert body["error"]["type"] == kind


async def test_every_error_of_its_paths_is_in_anthropics_form(service: TestService) -> None:
    http = service.http
    for response, kind in (
        (await http.get("/v1/messages"), "invalid_request_error"),
        (await http.post("/v1/messages/batches", json={}), "not_found_error"),
        (await http.post("/v1/messages", content=b"{}"), "invalid_request_error"),
        (await http.post("/v1/messages", json=[]), "invalid_request_error"),
        (
            await http.post("/v1/messages", json={}, headers={"x-long": "a" * 40_000}),
            "invalid_request_error",
        ),
        (await http.post("/v1/messages/count_tokens", json={}), "invalid_request_error"),
    ):
        assert response.status_code >= 400
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)
    assert set((await http.get("/v1/messagesabc")).json()) == {"error"}


async def test_a_stream_that_cannot_begin_ends_with_an_error_of_its_api(
    service: TestService,
) -> None:
    """The headers are sent first, so that a client knows that its request was taken."""
    for post, last in ((responses, "response.failed"), (messages, "error")):
        service.prefiller.failures = [PrefillFailed("broken") for _ in range(9)]
        own: dict[str, Any] = {"input": "a"} if post is responses else {}
        answer = await post(service, stream=True, **own)
        service.prefiller.failures = []
        assert answer.status_code == 200
        names = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
        assert (names[0], names[-1]) == (
            "response.created" if post is responses else "message_start",
            last,
        )
        assert "[DONE]" not in answer.text


async def test_aliases_and_keys_in_anthropics_header(
    model_path: Path, redis_url: str, tmp_path: Path
) -> None:
    key, entry = new_key("agent")
    (tmp_path / "keys.yaml").write_text(entry_text(entry))
    changes: dict[str, Any] = {
        "api_keys_file": tmp_path / "keys.yaml",
        "model_aliases": "claude-opus,gpt-5",
    }
    async with running_service(model_path, redis_url, **changes) as service:
        refused = await messages(service)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        service.http.headers["x-api-key"] = key
        for name in ("claude-opus", "gpt-5", MODEL_NAME):
            assert (await messages(service, model=name)).json()["model"] == name
            assert (await responses(service, model=name, input="a")).json()["model"] == name
            assert (await chat(service, USER, model=name))["model"] == name
            card = (await service.http.get(f"/v1/models/{name}")).json()
            assert card["id"] == name
        assert (await messages(service, model="claude-sonnet")).status_code == 404
        assert (await service.http.get("/v1/models/claude-sonnet")).status_code == 404
        listed = (await service.http.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == [MODEL_NAME, "claude-opus", "gpt-5"]
