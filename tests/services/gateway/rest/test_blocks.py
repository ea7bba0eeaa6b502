"""Streams of blocks, read by the official clients: what they make of them is the whole answer."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from services.gateway.request.choices import Delta
from services.gateway.rest.blocks import BlockFormatter
from services.gateway.rest.event_stream import event_text
from services.gateway.rest.messages_format import MessagesFormatter, tool_input_of
from services.gateway.rest.requests import RequestReader
from services.gateway.rest.responses_format import ResponsesFormatter
from services.gateway.rest.translate_messages import read_messages
from services.gateway.rest.translate_responses import read_responses
from services.gateway.usage import RequestUsage, WinnowUsage
from winnow.answers.parts import CallArguments, CallStart, Part, ReasoningPart, TextPart
from winnow.errors import EngineFailed, GrammarFailed, Overloaded
from winnow.tokens import FinishReason, Token, TokenLogprobs

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
ANSWER: list[Part] = [
    ReasoningPart("the "),
    ReasoningPart("fox"),
    TextPart("\n\n"),
    TextPart("I look"),
    TextPart(" it up."),
    TextPart("\n"),
    CallStart(0, "call_1", "look_up"),
    CallArguments(0, '{"word": '),
    CallArguments(0, '"fox"}'),
    TextPart("\n"),
    CallStart(1, "call_2", "wait"),
]


class Answer:
    """One answer in both forms, as a client of one API gets it."""

    def __init__(self, reader: RequestReader, api: str, **body: Any) -> None:
        self._reader, self._api, self._body = reader, api, body

    def formatter(self) -> BlockFormatter:
        if self._api == "responses":
            asked, parsed = read_responses(
                self._reader, {"model": "tiny", "input": "the fox", **self._body}
            )
            return ResponsesFormatter(parsed, asked, self._reader._tokenizer)
        messages = [{"role": "user", "content": "the fox"}]
        body = {"model": "tiny", "max_tokens": 9, "messages": messages, **self._body}
        return MessagesFormatter(read_messages(self._reader, body))

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        return dict(json.loads(json.dumps(self.formatter().whole(deltas, usage(len(deltas))))))

    def stream(self, deltas: list[Delta]) -> str:
        formatter = self.formatter()
        events = formatter.begin()
        for delta in deltas:
            events += formatter.events(delta)
        events += formatter.end(usage(len(deltas)))
        return "".join(f"{event_text(event)}\n\n" for event in events)


def usage(num_tokens: int) -> RequestUsage:
    zero: Any = {field.name: 0 for field in fields(WinnowUsage)}
    text = {"no_selection_reason": "", "no_prefix_reason": "", "rho": {}, "cached_tokens": 2}
    return RequestUsage(7, num_tokens, (WinnowUsage(**(zero | text)),))


def deltas_of(
    parts: Sequence[Part], finish: FinishReason = STOP, stop_reason: int | str | None = None
) -> list[Delta]:
    """A delta with a token for each part, and one that ends the answer."""
    logprobs = TokenLogprobs(-0.5, ((5, -0.5),))
    deltas = [
        Delta(0, getattr(part, "text", ""), (Token(0, 5, logprobs),), parts=(part,))
        for part in parts
    ]
    return [*deltas, Delta(0, "", (Token(0, 1, logprobs, finish),), finish, stop_reason)]


def played(stream: str) -> httpx2.AsyncClient:
    """A client whose every request is answered with the stream."""

    def answer(_: httpx2.Request) -> httpx2.Response:
        headers = {"content-type": "text/event-stream; charset=utf-8"}
        return httpx2.Response(200, headers=headers, content=stream.encode())

    return httpx2.AsyncClient(transport=httpx2.MockTransport(answer))


def events_of(stream: str) -> list[dict[str, Any]]:
    """The events, each with its own name in its data."""
    events = []
    for text in stream.strip().split("\n\n"):
        name, data = text.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def response_from(stream: str) -> Response:
    async with (
        openai.AsyncOpenAI(api_key="none", http_client=played(stream)) as client,
        client.responses.stream(model="tiny", input="the fox") as events,
    ):
        return await events.get_final_response()


async def message_from(stream: str) -> Message:
    async with anthropic.AsyncAnthropic(api_key="none", http_client=played(stream)) as client:
        manager = client.messages.stream(
            model="tiny", max_tokens=9, messages=[{"role": "user", "content": "the fox"}]
        )
        async with manager as events:
            return await events.get_final_message()


def comparable(value: Any) -> Any:
    """Without what differs between two answers, and what a client adds."""
    if isinstance(value, dict):
        others = ("id", "created_at", "parsed", "parsed_arguments", "parsed_output")
        own = {name: inner for name, inner in value.items() if name not in others}
        return {name: comparable(inner) for name, inner in own.items()}
    return [comparable(inner) for inner in value] if isinstance(value, list) else value


async def test_a_streamed_response_is_the_whole_one(reader: RequestReader) -> None:
    answer, deltas = Answer(reader, "responses", stream=True), deltas_of(ANSWER)
    final = await response_from(answer.stream(deltas))
    whole = answer.whole(deltas)
    assert comparable(whole) == comparable(final.to_dict(mode="json"))
    Response.model_validate(whole)
    assert [item["type"] for item in whole["output"]] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    assert final.output_text == "\n\nI look it up.\n"
    assert [item["arguments"] for item in whole["output"][2:]] == ['{"word": "fox"}', "{}"]
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    assert whole["status"] == "completed"


async def test_a_streamed_message_is_the_whole_one(reader: RequestReader) -> None:
    answer, deltas = Answer(reader, "messages", stream=True), deltas_of(ANSWER)
    final = await message_from(answer.stream(deltas))
    whole = answer.whole(deltas)
    Message.model_validate(whole)
    told = final.to_dict()
    assert comparable(whole["content"]) == comparable(told["content"])
    assert [block["type"] for block in whole["content"]] == [
        *("thinking", "text", "tool_use", "tool_use")
    ]
    assert [block["input"] for block in whole["content"][2:]] == [{"word": "fox"}, {}]
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", len(deltas))
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (5, 2)


def test_every_event_is_of_the_clients_types(reader: RequestReader) -> None:
    types: dict[str, Any] = {"responses": ResponseStreamEvent, "messages": RawMessageStreamEvent}
    for api, event_type in types.items():
        adapter: TypeAdapter[Any] = TypeAdapter(event_type)
        for finish in (STOP, LENGTH):
            events = events_of(Answer(reader, api).stream(deltas_of(ANSWER, finish)))
            for event in events:
                adapter.validate_python(event)
    numbers = [
        event["sequence_number"]
        for event in events_of(Answer(reader, "responses").stream(deltas_of(ANSWER)))
    ]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["{'a':", " 1}"], {}),
        (['{"a": 1', " and more"], {}),
        (['{"a": NaN,', ' "b": "\\ud800"}'], {"a": None, "b": "?"}),
        (["[1, ", "2]"], {}),
    ],
)
async def test_a_streamed_calls_input_is_json_whatever_the_model_wrote(
    reader: RequestReader, pieces: list[str], expected: Any
) -> None:
    call: list[Part] = [CallStart(0, "c1", "f"), *(CallArguments(0, piece) for piece in pieces)]
    streamed = await message_from(Answer(reader, "messages").stream(deltas_of(call)))
    assert [block.input for block in streamed.content if block.type == "tool_use"] == [expected]


async def test_without_any_text_there_is_one_empty_block(reader: RequestReader) -> None:
    for parts in ([], [TextPart(" \n")]):
        response = Answer(reader, "responses").whole(deltas_of(parts))
        message = Answer(reader, "messages").whole(deltas_of(parts))
        text = "".join(part.text for part in parts)
        assert [part["text"] for part in response["output"][0]["content"]] == [text]
        assert [block["text"] for block in message["content"]] == [text]
    streamed = await message_from(Answer(reader, "messages").stream(deltas_of([])))
    assert [block.type for block in streamed.content] == ["text"]


def test_an_answer_that_was_cut_off_says_so(reader: RequestReader) -> None:
    cut = deltas_of(ANSWER[:8], LENGTH)
    stream = events_of(Answer(reader, "responses").stream(cut))
    response = stream[-1]["response"]
    assert (stream[-1]["type"], response["status"]) == ("response.incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == [
        *("completed", "completed", "incomplete")
    ]
    assert response["output"][2]["arguments"] == '{"word": '
    message = Answer(reader, "messages").whole(cut)
    assert (message["stop_reason"], message["content"][2]["input"]) == ("max_tokens", {})


@pytest.mark.parametrize(
    ("parts", "stop_reason", "expected"),
    [
        ([TextPart("a")], None, ("end_turn", None)),
        ([TextPart("a")], 17, ("end_turn", None)),
        ([TextPart("a")], "END", ("stop_sequence", "END")),
        (ANSWER, None, ("tool_use", None)),
    ],
)
def test_a_message_says_why_it_ended(
    reader: RequestReader, parts: list[Part], stop_reason: Any, expected: tuple[str, str | None]
) -> None:
    deltas = deltas_of(parts, STOP, stop_reason)
    whole = Answer(reader, "messages").whole(deltas)
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    told = events_of(Answer(reader, "messages").stream(deltas))[-2]
    assert told["delta"] == {"stop_reason": expected[0], "stop_sequence": expected[1]}


def test_logprobs_are_those_of_the_text(reader: RequestReader) -> None:
    body: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    held = [Delta(0, "", (Token(0, 5, TokenLogprobs(-0.5, ((5, -0.5),))),))]  # half a character
    deltas = [*deltas_of(ANSWER[:2])[:2], *held, *deltas_of(ANSWER[2:])]
    answer = Answer(reader, "responses", **body)
    part = answer.whole(deltas)["output"][1]["content"][0]
    assert [token["logprob"] for token in part["logprobs"]] == [-0.5] * 5
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [1] * 5
    streamed = [e for e in events_of(answer.stream(deltas)) if "output_text.delta" in e["type"]]
    assert [len(event["logprobs"]) for event in streamed] == [3, 1, 1]
    assert Answer(reader, "responses").whole(deltas)["output"][1]["content"][0]["logprobs"] == []


async def test_a_stream_that_fails_ends_with_an_error_of_its_api(reader: RequestReader) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for error, code in (
        (EngineFailed("it broke"), "server_error"),
        (Overloaded("full"), "rate_limit_exceeded"),
        (GrammarFailed("too complex"), "invalid_prompt"),
    ):
        formatter = Answer(reader, "responses").formatter()
        begun = [*formatter.begin(), *formatter.events(deltas_of([TextPart("a")])[0])]
        failure = formatter.failure(error)
        adapter.validate_python(failure.data)
        response = failure.data["response"]
        assert (failure.name, response["status"]) == ("response.failed", "failed")
        assert (response["error"]["code"], response["error"]["type"]) == (code, error.code)
        assert failure.data["sequence_number"] == len(begun)
        assert response["output"][0]["status"] == "incomplete"
    formatter = Answer(reader, "messages").formatter()
    stream = "".join(
        f"{event_text(event)}\n\n"
        for event in [*formatter.begin(), formatter.failure(EngineFailed("it broke"))]
    )
    with pytest.raises(anthropic.APIStatusError, match="it broke") as raised:
        await message_from(stream)
    assert raised.value.type == "api_error"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        ('{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": None, "b": None, "c": None}),
        ('{"a": "\\ud800"}', {"a": "?"}),
        ('{"a": "\\ud83e\\udd8a"}', {"a": "\N{FOX FACE}"}),
        *((text, {}) for text in ("", "[1]", "1", '"a"', '{"a":', "{'a': 1}", "[" * 5000)),
        ("1" * 5000, {}),
    ],
)
def test_a_calls_input_is_an_object_that_json_can_say(arguments: str, expected: Any) -> None:
    assert tool_input_of(arguments) == expected
    json.dumps(tool_input_of(arguments), allow_nan=False, ensure_ascii=False).encode()
