"""Calls of tools and reasoning through the official client, with answers that a test writes."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from tests.services.gateway.said import QUESTION, Say, chunks_of, saying
from tests.services.gateway.service import MODEL_NAME, TestService, running_service
from tests.winnow.tool_templates import HERMES
from winnow.tokens import FinishReason

pytestmark = pytest.mark.asyncio(loop_scope="module")


class GetWeather(BaseModel):
    """Says what the sky does."""

    city: str
    days: int = 1


TOOL = openai.pydantic_function_tool(GetWeather, name="get_weather")
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
)
THOUGHT = "<think>\nI must look.\n</think>\n\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    model_path: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[TestService]:
    """One whose vocabulary has the tags of calls as special tokens."""
    folder = tmp_path_factory.mktemp("model") / "own"
    shutil.copytree(model_path, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(HERMES)
    async with running_service(folder, redis_url) as service:
        yield service
        await service.until_idle()


@pytest.fixture
def say(service: TestService, monkeypatch: pytest.MonkeyPatch) -> Say:
    return saying(service, monkeypatch, [TOOL])


async def test_a_call_is_streamed_as_openai_does(service: TestService, say: Say) -> None:
    chunks = await chunks_of(service, say(f"I look.\n\n{CALL}"))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    first, rest = calls[0], calls[1:]
    assert first.id.startswith("call_")
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.function.arguments == ""
    assert len(rest) > 5, "the arguments come as they are written"
    assert all(
        (one.index, one.id, one.type, one.function.name) == (0, None, None, None) for one in rest
    )
    text = "".join(one.function.arguments for one in rest)
    assert json.loads(text) == {"city": "Rome", "days": 2}
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [*[None] * (len(chunks) - 1), "tool_calls"]


async def test_a_whole_answer_has_its_calls(service: TestService, say: Say) -> None:
    two = f"{CALL}\n{CALL.replace('Rome', 'Oslo')}\n"
    answer = await service.openai.chat.completions.create(**say(two))
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls: Any = choice.message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Rome", "Oslo"]
    assert len({call.id for call in calls}) == 2
    one = await service.openai.chat.completions.create(**say(two, parallel_tool_calls=False))
    assert len(one.choices[0].message.tool_calls or ()) == 1


async def test_the_clients_own_helpers_read_the_stream(service: TestService, say: Say) -> None:
    two = f"Well.\n{CALL}\n{CALL.replace('Rome', 'Oslo')}"
    async with service.openai.chat.completions.stream(**say(two)) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    message = final.choices[0].message
    assert (message.content, final.choices[0].finish_reason) == ("Well.", "tool_calls")
    parsed = [call.function.parsed_arguments for call in message.tool_calls or ()]
    assert parsed == [GetWeather(city="Rome", days=2), GetWeather(city="Oslo", days=2)]
    parsed_whole = await service.openai.chat.completions.parse(**say(CALL))
    calls = parsed_whole.choices[0].message.tool_calls or ()
    assert [call.function.parsed_arguments for call in calls] == parsed[:1]


async def test_a_result_is_sent_back_with_the_call(service: TestService, say: Say) -> None:
    message = (await service.openai.chat.completions.create(**say(CALL))).choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "17 <|end|>"}
    messages = [*QUESTION, message.model_dump(exclude_none=True), result]
    answer = await service.openai.chat.completions.create(**say("Sun.", messages=messages))
    assert answer.choices[0].message.content == "Sun."
    body = {"messages": messages, "tools": [TOOL], "return_token_strs": True}
    tokens = (await service.http.post("/tokenize", json=body)).json()
    assert answer.usage is not None and answer.usage.prompt_tokens == tokens["count"]
    text = "".join(tokens["token_strs"])
    assert CALL in text and "<tool_response>\n17 <|end|>\n</tool_response>" in text
    assert '"name": "get_weather"' in text and "strict" not in text
    special = [tokens["token_strs"][idx] for idx in tokens["special"]]
    assert special == ["<tool_call>", "</tool_call>"] * 2, "of the template alone"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "another", "arguments": {}}</tool_call>',
        "<tool_call>{'name': 'get_weather'}</tool_call>",
        '{"name": "get_weather", "arguments": {"city": "Rome"}}',
        "<tool_call></tool_call> <tool_call",
    ],
)
async def test_what_is_no_call_is_content(service: TestService, say: Say, text: str) -> None:
    chunks = await chunks_of(service, say(text))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_an_answer_cut_off_in_a_call_ends_by_length(service: TestService, say: Say) -> None:
    answer = await service.openai.chat.completions.create(**say(CALL[:-30], FinishReason.LENGTH))
    choice = answer.choices[0]
    calls: Any = choice.message.tool_calls
    assert choice.finish_reason == "length"
    assert calls[0].function.arguments == CALL[:-30].partition('"arguments": ')[2]


async def test_without_tools_the_text_of_a_call_is_content(service: TestService, say: Say) -> None:
    options: list[dict[str, Any]] = [{"tools": []}, {"tool_choice": "none"}]
    for more in options:
        answer = await service.openai.chat.completions.create(**say(CALL[11:], **more))
        message = answer.choices[0].message
        assert message.content == CALL[11:].removesuffix("</tool_call>")
        assert message.tool_calls is None


async def test_reasoning_is_told_apart(service: TestService, say: Say) -> None:
    answer = await service.openai.chat.completions.create(**say(f"{THOUGHT}{CALL}"))
    message: Any = answer.choices[0].message
    assert message.reasoning_content == "I must look."
    assert (message.content, len(message.tool_calls)) == (None, 1)
    deltas: list[Any] = [
        chunk.choices[0].delta
        for chunk in await chunks_of(service, say(f"{THOUGHT}Sun.", tools=[]))
    ]
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(reasoning) == "I must look." and len([one for one in reasoning if one]) > 3
    assert "".join(delta.content or "" for delta in deltas) == "Sun."
    assert "reasoning_content" not in deltas[-1].model_dump()


async def test_reasoning_can_be_left_out(service: TestService, say: Say) -> None:
    given = say(f"{THOUGHT}Sun.", extra_body={"include_reasoning": False})
    answer = await service.openai.chat.completions.create(**given)
    message: Any = answer.choices[0].message
    assert message.content == "Sun." and not hasattr(message, "reasoning_content")
    kwargs = {"enable_thinking": False}
    given = say(f"{THOUGHT}Sun.", extra_body={"chat_template_kwargs": kwargs})
    answer = await service.openai.chat.completions.create(**given)
    assert answer.choices[0].message.content == f"{THOUGHT}Sun.", "the prompt has closed the tag"


async def test_a_strict_call_is_enforced_once_it_has_begun(service: TestService) -> None:
    cities = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bonn"]}}}
    function: Any = {"name": "pick", "strict": True}
    function["parameters"] = cities | {"required": ["city"]}
    begin = service.gateway.model.tokenizer.added_token_id("<tool_call>")
    given: dict[str, Any] = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 400}
    answer = await service.openai.chat.completions.create(
        **given,
        tools=[{"type": "function", "function": function}],
        parallel_tool_calls=False,
        logit_bias={str(begin): 100},
    )
    (choice,) = answer.choices
    calls: Any = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Bonn")


async def test_log_probabilities_and_usage_count_each_token_once(
    service: TestService, say: Say
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    given = say(f"{THOUGHT}Well.\n{CALL}", logprobs=True, stream_options=options)
    chunks = await chunks_of(service, given)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    listed = [
        entry.token for choice in choices if choice.logprobs for entry in choice.logprobs.content
    ]
    assert len(listed) == given["max_tokens"]
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == given["max_tokens"]


async def test_every_choice_has_calls_of_its_own(service: TestService, say: Say) -> None:
    answer = await service.openai.chat.completions.create(**say(CALL, n=2))
    async with service.openai.chat.completions.stream(**say(CALL, n=2)) as stream:
        streamed = await stream.get_final_completion()
    assert [choice.index for choice in streamed.choices] == [0, 1]
    assert [choice.message.content for choice in streamed.choices] == [None, None]
    ids = {call.id for choice in answer.choices for call in choice.message.tool_calls or ()}
    assert len(ids) == 2


async def test_a_stop_string_within_a_call_leaves_it_unfinished(
    service: TestService, say: Say
) -> None:
    answer = await service.openai.chat.completions.create(**say(CALL, stop='", "days'))
    choice = answer.choices[0]
    calls: Any = choice.message.tool_calls
    assert calls[0].function.arguments == '{"city": "Rome'
    assert choice.finish_reason == "stop"


def flat_tool() -> dict[str, Any]:
    """The tool as /v1/responses takes it."""
    function: Any = TOOL["function"]
    return {"type": "function", **function}


async def prompt_of_round(service: TestService, given: dict[str, Any], call_id: str) -> int:
    """The tokens of a chat in which the model has thought, called, and got a result."""
    arguments = json.dumps({"city": "Rome", "days": 2})
    function = {"name": "get_weather", "arguments": arguments}
    called = {
        "role": "assistant",
        "content": "Well.",
        "reasoning_content": "I must look.",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": call_id, "content": "17"}
    body = {"messages": [*QUESTION, called, result], "tools": given["tools"]}
    return int((await service.http.post("/tokenize", json=body)).json()["count"])


async def test_a_round_over_responses(service: TestService, say: Say) -> None:
    given = say(f"{THOUGHT}Well.\n\n{CALL}")
    asked: dict[str, Any] = {
        "model": MODEL_NAME,
        "tools": [flat_tool()],
        "max_output_tokens": given["max_tokens"],
        "extra_body": given["extra_body"],
    }
    async with service.openai.responses.stream(input=QUESTION, **asked) as stream:
        types = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert types.count("response.reasoning_text.delta") > 3
    assert types.count("response.function_call_arguments.delta") > 5
    thought, said, call = final.output
    assert thought.type == "reasoning" and thought.content is not None
    assert thought.content[0].text == "I must look."
    assert said.type == "message" and final.output_text == "Well."
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Rome", "days": 2}
    assert final.usage is not None
    assert final.usage.output_tokens == given["max_tokens"]
    assert 5 < final.usage.output_tokens_details.reasoning_tokens < final.usage.output_tokens
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "17"}
    history: Any = [*QUESTION, *final.output, result]
    expected = await prompt_of_round(service, given, call.call_id)
    given = say("Sun.")
    answer = await service.openai.responses.create(
        input=history, **asked | {"max_output_tokens": 5}
    )
    assert answer.output_text == "Sun."
    assert answer.usage is not None and answer.usage.input_tokens == expected


async def test_a_round_over_messages(service: TestService, say: Say) -> None:
    given = say(f"{THOUGHT}Well.\n\n{CALL}")
    schema: Any = flat_tool()["parameters"]
    asked: dict[str, Any] = {
        "model": MODEL_NAME,
        "tools": [
            {
                "name": "get_weather",
                "description": flat_tool()["description"],
                "input_schema": schema,
            }
        ],
        "extra_body": given["extra_body"],
    }
    async with anthropic.AsyncAnthropic(base_url=service.url, api_key="none") as client:
        manager = client.messages.stream(messages=QUESTION, max_tokens=given["max_tokens"], **asked)
        async with manager as stream:
            deltas = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert deltas.count("thinking") > 3 and deltas.count("input_json") == 1
        thought, said, call = final.content
        assert (thought.type, said.type, call.type) == ("thinking", "text", "tool_use")
        assert call.type == "tool_use" and call.input == {"city": "Rome", "days": 2}
        assert final.stop_reason == "tool_use"
        expected = await prompt_of_round(service, given, call.id)
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "17"}
        messages: Any = [
            *QUESTION,
            {"role": "assistant", "content": final.content},
            {"role": "user", "content": [result]},
        ]
        counted = await client.messages.count_tokens(
            model=MODEL_NAME, messages=messages, tools=asked["tools"]
        )
        assert counted.input_tokens == expected
        given = say("Sun.")
        answer = await client.messages.create(messages=messages, max_tokens=5, **asked)
        assert [block.type for block in answer.content] == ["text"]
        assert answer.usage.input_tokens == expected


async def test_thinking_that_is_disabled_is_not_shown(service: TestService, say: Say) -> None:
    for thinking, shown in (
        ({"type": "enabled", "budget_tokens": 1024}, ["thinking", "text"]),
        ({"type": "adaptive", "display": "omitted"}, ["text"]),
        ({"type": "disabled"}, ["text"]),
    ):
        given = say(f"{THOUGHT}Sun.")
        body = {
            "model": MODEL_NAME,
            "messages": QUESTION,
            "max_tokens": given["max_tokens"],
            "thinking": thinking,
            "ignore_eos": True,
        }
        answer = (await service.http.post("/v1/messages", json=body)).json()
        assert [block["type"] for block in answer["content"]] == shown
