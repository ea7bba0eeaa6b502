"""What requests of other APIs are as chats, and what errors call their parts."""

import json
from typing import Any

import pytest

from services.gateway.body import validate
from services.gateway.client_names import client_names
from services.gateway.rest.messages_bodies import CountTokensRequest, MessagesRequest
from services.gateway.rest.responses_bodies import ResponsesRequest
from services.gateway.rest.translate_messages import translate_count, translate_messages
from services.gateway.rest.translate_responses import translate_responses
from services.gateway.rest.translated import Translated
from winnow.errors import InvalidRequest, InvalidSetting, PromptTooLong, UnknownModel

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}


def of_responses(**body: Any) -> Translated:
    return translate_responses(validate(ResponsesRequest, {"model": "m", "input": "hi"} | body))


def of_messages(**body: Any) -> Translated:
    usual = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    return translate_messages(validate(MessagesRequest, usual | body))


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def renamed(translated: Translated, error: InvalidRequest) -> InvalidRequest:
    with pytest.raises(type(error)) as raised, client_names(translated.names):
        raise error
    assert isinstance(raised.value, InvalidRequest)
    return raised.value


def test_a_conversation_with_calls_in_items() -> None:
    translated = of_responses(
        instructions="be brief",
        input=[
            {"role": "user", "content": "q"},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "short"}],
                "content": [{"type": "reasoning_text", "text": "I should look"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "let me look"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": t} for t in ("two", "three")],
            },
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "now g"}]},
            {"type": "function_call", "call_id": "c3", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c3", "output": ""},
        ],
    )
    assert translated.body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "let me look",
            "reasoning_content": "I should look",
            "tool_calls": [call("c1", "f", '{"a":1}'), call("c2", "g", "{}")],
        },
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
        {"role": "tool", "content": "two\nthree", "tool_call_id": "c2"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "now g",
            "tool_calls": [call("c3", "g", "{}")],
        },
        {"role": "tool", "content": "", "tool_call_id": "c3"},
    ]


def test_a_conversation_with_calls_in_blocks() -> None:
    translated = of_messages(
        system=[{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I should look", "signature": "x"},
                    {"type": "text", "text": "let me "},
                    {"type": "text", "text": "look"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": "\u00e9", "a": 1}},
                    {"type": "thinking", "thinking": "and g", "signature": "y"},
                    {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "go on"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": t} for t in ("two", "three")],
                    },
                ],
            },
            {"role": "user", "content": "please"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t3"} | NAMED]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t3"}]},
        ],
    )
    assert translated.body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "let me look",
            "reasoning_content": "I should look\nand g",
            "tool_calls": [call("t1", "f", '{"b": "\u00e9", "a": 1}'), call("t2", "g", "{}")],
        },
        {"role": "tool", "content": "one", "tool_call_id": "t1"},
        {"role": "tool", "content": "two\nthree", "tool_call_id": "t2"},
        {"role": "user", "content": "go on\nplease"},
        {"role": "assistant", "content": None, "tool_calls": [call("t3", "g", "{}")]},
        {"role": "tool", "content": "", "tool_call_id": "t3"},
    ]
    assert "continue_final_message" not in translated.body


NAMED = {"name": "g", "input": {}}


def test_how_much_to_reason_is_passed_on_under_its_own_name() -> None:
    translated = of_responses(reasoning={"effort": "low", "summary": "auto"})
    assert translated.body["reasoning_effort"] == "low"
    error = InvalidSetting("reasoning_effort is 3", param="reasoning_effort")
    assert renamed(translated, error).param == "reasoning.effort"
    for nothing in (None, {}, {"effort": None}):
        assert "reasoning_effort" not in of_responses(reasoning=nothing).body


def test_tools_keep_their_schemas_order() -> None:
    flat = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA}
    anthropics = {"name": "f", "description": "d", "input_schema": SCHEMA}
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    expected = [{"type": "function", "function": function}]
    for translated in (
        of_responses(tools=[flat]),
        of_messages(tools=[anthropics]),
        of_messages(tools=[anthropics | {"type": "custom", "eager_input_streaming": True}]),
    ):
        assert json.dumps(translated.body["tools"]) == json.dumps(expected)
    strict = of_responses(tools=[flat | {"strict": True, "defer_loading": False}])
    assert strict.body["tools"][0]["function"]["strict"] is True


@pytest.mark.parametrize(
    ("theirs", "chats"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_a_choice_of_tools(theirs: dict[str, Any], chats: Any) -> None:
    tools = [{"name": "f", "input_schema": SCHEMA}]
    body = of_messages(tools=tools, tool_choice=theirs).body
    assert body["tool_choice"] == chats
    assert "parallel_tool_calls" not in body
    one = of_messages(tools=tools, tool_choice=theirs | {"disable_parallel_tool_use": True}).body
    assert one["parallel_tool_calls"] is False
    if isinstance(chats, dict):
        theirs = {"type": "function", "name": "f"}
    flat = [{"type": "function", "name": "f", "parameters": SCHEMA}]
    given = theirs if isinstance(chats, dict) else chats
    assert of_responses(tools=flat, tool_choice=given).body["tool_choice"] == chats


def test_an_automatic_choice_of_no_tool_asks_for_nothing() -> None:
    assert "tool_choice" not in of_responses(tools=[], tool_choice="auto").body
    assert "tool_choice" not in of_messages(tool_choice={"type": "auto"}).body


def test_a_schema_of_the_answer() -> None:
    named = {"name": "n", "schema": SCHEMA, "strict": True}
    expected = {"type": "json_schema", "json_schema": named}
    text = {"format": {"type": "json_schema", **named}}
    assert of_responses(text=text).body["response_format"] == expected
    assert of_responses(text={"format": {"type": "json_object"}}).body["response_format"] == {
        "type": "json_object"
    }
    theirs = {"type": "json_schema", "schema": SCHEMA}
    expected = {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA}}
    assert of_messages(output_format=theirs).body["response_format"] == expected
    config = {"format": theirs, "effort": "low"}
    assert of_messages(output_config=config).body["response_format"] == expected


@pytest.mark.parametrize(
    ("thinking", "enabled", "shown"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True, None),
        ({"type": "disabled"}, False, False),
        ({"type": "adaptive"}, None, None),
        ({"type": "adaptive", "display": "omitted"}, None, False),
        (None, None, None),
    ],
)
def test_thinking(thinking: Any, enabled: bool | None, shown: bool | None) -> None:
    body = of_messages(thinking=thinking).body
    assert body.get("chat_template_kwargs", {}).get("enable_thinking") is enabled
    assert body.get("include_reasoning") is shown


def test_counting_needs_only_the_prompt() -> None:
    tools = [{"name": "f", "input_schema": SCHEMA}]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    for choice, expected in (("any", None), ("none", "none")):
        request = validate(CountTokensRequest, body | {"tool_choice": {"type": choice}})
        counted = translate_count(request).body
        assert counted.get("tool_choice") == expected
        assert counted["tools"] and counted["max_completion_tokens"] == 1


def test_neighbours_of_one_role_are_one_message() -> None:
    translated = of_responses(
        instructions="be brief",
        input=[
            {"role": "developer", "content": "and kind"},
            {"role": "user", "content": "<environment>"},
            {"role": "user", "content": "q"},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"role": "assistant", "content": "let me look"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"role": "assistant", "content": "so"},
            {"role": "assistant", "content": "it is"},
        ],
    )
    looked = {"role": "assistant", "content": "let me look", "tool_calls": [call("c1", "f", "{}")]}
    assert translated.body["messages"] == [
        {"role": "system", "content": "be brief\n\nand kind"},
        {"role": "user", "content": "<environment>\nq"},
        looked,
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
        {"role": "assistant", "content": "so\nit is"},
    ]


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": " "}]])
def test_a_failed_call_that_says_nothing_is_told_as_failed(content: Any) -> None:
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t3"} | NAMED]}
    result = {"type": "tool_result", "tool_use_id": "t3", "is_error": True, "content": content}
    translated = of_messages(
        messages=[{"role": "user", "content": "q"}, use, {"role": "user", "content": [result]}]
    )
    assert translated.body["messages"][-1]["content"] == "Error"


BILLING = "x-anthropic-billing-header: cc_version=1"


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (f"{BILLING}\nbe brief", ["be brief"]),
        (BILLING, []),
        ([{"type": "text", "text": text} for text in (BILLING, "be brief")], ["be brief"]),
        (
            [{"type": "text", "text": text} for text in ("be brief", BILLING)],
            [f"be brief\n\n{BILLING}"],
        ),
    ],
)
def test_only_the_first_line_or_block_is_for_accounting(system: Any, expected: list[str]) -> None:
    messages = of_messages(system=system).body["messages"]
    assert [one["content"] for one in messages if one["role"] == "system"] == expected


def test_errors_name_the_parts_of_a_response() -> None:
    translated = of_responses(
        instructions="be brief",
        input=[
            {"role": "user", "content": "q"},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
        ],
        tools=[{"type": "function", "name": "f", "parameters": SCHEMA}],
    )
    for theirs, ours in {
        "messages": "input",
        "messages[0]": "instructions",
        "messages[1].content": "input[0].content",
        "messages[2].tool_calls[0].function.name": "input[1].name",
        "messages[2].tool_calls[0].id": "input[1].id",
        "messages[3].tool_call_id": "input[2].call_id",
        "tools[0].function.parameters.properties.a": "tools[0].parameters.properties.a",
        "max_completion_tokens": "max_output_tokens",
        "response_format.json_schema.schema.properties": "text.format.schema.properties",
        "response_format.type": "text.format.type",
        "temperature": "temperature",
    }.items():
        error = renamed(translated, InvalidSetting(f"{theirs} is 7, {theirs}x not", param=theirs))
        assert error.param == ours
        assert error.message.startswith(f"{ours} is 7")
    both = InvalidSetting("tool_choice.function with response_format, not 'messages'", param="n")
    assert renamed(translated, both).message == "tool_choice with text.format, not 'messages'"
    unknown = UnknownModel("no model", param="model")
    assert renamed(translated, unknown) is unknown


def test_errors_name_the_parts_of_a_message() -> None:
    used = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "one"}
    translated = of_messages(
        system="be brief",
        messages=[
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, used]},
            {"role": "user", "content": [result]},
        ],
        tools=[{"name": "f", "input_schema": SCHEMA}],
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    for theirs, ours in {
        "messages[0]": "system",
        "messages[2].tool_calls[0].function.name": "messages[1].content[1].name",
        "messages[3].tool_call_id": "messages[2].content[0].tool_use_id",
        "tools[0].function.parameters.x": "tools[0].input_schema.x",
        "tools[0].function.name": "tools[0].name",
        "max_completion_tokens": "max_tokens",
        "stop": "stop_sequences",
        "response_format.json_schema.schema": "output_config.format.schema",
    }.items():
        assert renamed(translated, InvalidSetting(f"{theirs} is bad", param=theirs)).param == ours
    stop = InvalidSetting("stop[0] has 2,000 characters", param="stop")
    assert renamed(translated, stop).message == "stop_sequences[0] has 2,000 characters"
    long = PromptTooLong(
        "prompt of 9 tokens and max_completion_tokens of 5 make 14", param="max_completion_tokens"
    )
    assert renamed(translated, long).message == "prompt of 9 tokens and max_tokens of 5 make 14"


def test_an_error_stays_as_it_is_where_the_client_has_no_names_of_its_own() -> None:
    error = renamed(Translated({}, {}), InvalidRequest("model is empty", param="model"))
    assert (error.message, error.param) == ("model is empty", "model")
