"""Tools, reasoning and structured output over gRPC, as over REST."""

import json
from typing import Any

import grpc
import pytest

from services.common.rpc import error_from_rpc
from tests.services.gateway.grpc_requests import request
from tests.services.gateway.service import TestService
from winnow.v1 import inference_pb2 as pb
from winnow.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

CITY_NAMES = ["Paris", "Rome"]
PROPERTIES = {"city": {"enum": CITY_NAMES}}
CITY = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
TOOL = pb.Tool(name="weather", description="of a city", parameters=json.dumps(CITY))
ASKED = pb.ChatMessage(role="user", content="the fox")


async def answer(service: TestService, **changes: Any) -> tuple[list[pb.ChoiceDelta], pb.Usage]:
    asked = request(**{"max_tokens": 200, "ignore_eos": False} | changes)
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        chunks = [one async for one in InferenceStub(channel).Complete(asked, timeout=60)]
    return [choice for chunk in chunks for choice in chunk.choices], chunks[-1].usage


def text_of(deltas: list[pb.ChoiceDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        ({"json_schema": json.dumps(CITY)}, lambda text: json.loads(text)["city"] in CITY_NAMES),
        ({"regex": "[a-c]{3}"}, lambda text: len(text) == 3 and set(text) <= set("abc")),
        ({"choice": pb.Choices(texts=["ja", "nein"])}, lambda text: text in ("ja", "nein")),
        ({"lark": 'start: "x" /[0-9]/'}, lambda text: text[0] == "x" and text[1:].isdigit()),
        (
            {"json_schema": json.dumps(CITY), "disable_any_whitespace": True},
            lambda text: text in ('{"city":"Paris"}', '{"city":"Rome"}'),
        ),
    ],
)
async def test_an_answer_matches_what_is_asked_for(
    service: TestService, grammar: dict[str, Any], matches: Any
) -> None:
    deltas, _ = await answer(service, **grammar)
    assert matches(text_of(deltas))
    assert deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize("choice", [{"tool_choice": "required"}, {"tool_choice": "function"}])
async def test_a_tool_is_called_in_pieces(service: TestService, choice: dict[str, str]) -> None:
    name = {"tool_name": "weather"} if choice["tool_choice"] == "function" else {}
    asked: dict[str, Any] = {"parallel_tool_calls": False, **choice, **name}
    messages = pb.ChatMessages(messages=[ASKED], tools=[TOOL], **asked)
    deltas, _ = await answer(service, messages=messages)
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert (calls[0].index, calls[0].name) == (0, "weather")
    assert calls[0].id
    assert not any(call.id or call.name for call in calls[1:])
    arguments = json.loads("".join(call.arguments for call in calls))
    assert arguments["city"] in CITY_NAMES
    assert (text_of(deltas), deltas[-1].finish_reason) == ("", "tool_calls")


async def test_a_call_and_its_result_are_part_of_the_conversation(service: TestService) -> None:
    call = pb.ToolCall(id="call_1", name="weather", arguments='{"city": "Rome"}')
    messages = [
        ASKED,
        pb.ChatMessage(role="assistant", tool_calls=[call]),
        pb.ChatMessage(role="tool", tool_call_id="call_1", content="sunny"),
    ]
    _, short = await answer(service, messages=pb.ChatMessages(messages=messages[:1], tools=[TOOL]))
    _, long = await answer(service, messages=pb.ChatMessages(messages=messages, tools=[TOOL]))
    assert long.prompt_tokens > short.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": '{"properties": {"age": {"not": {}}}}'}, "json_schema.properties.age"),
        ({"regex": "(?=a)"}, "regex"),
        ({"choice": pb.Choices()}, "choice"),
        ({"lark": "start: nothing"}, "lark"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"messages": {"tool_choice": "required"}}, "tool_choice"),
        ({"messages": {"tool_choice": "perhaps", "tools": [TOOL]}}, "tool_choice"),
        ({"messages": {"tool_choice": "function", "tools": [TOOL]}}, "tool_choice"),
        ({"messages": {"tools": [pb.Tool(name="a b")]}}, "tools[0].name"),
        ({"messages": {"tools": [pb.Tool(name="a", parameters="[]")]}}, "tools[0].parameters"),
        ({"messages": {"tools": [TOOL, TOOL]}}, "tools[1].name"),
    ],
)
async def test_what_cannot_be_carried_out_is_refused_by_name(
    service: TestService, changes: dict[str, Any], param: str
) -> None:
    if "messages" in changes:
        changes = {"messages": pb.ChatMessages(messages=[ASKED], **changes["messages"])}
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await answer(service, **changes)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    refusal = error_from_rpc(error.value)
    assert refusal.param == param
    assert ".function" not in refusal.message
