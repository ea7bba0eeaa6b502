"""Conversations with tools in every manner of template: nothing of them is lost."""

from typing import Any

import pytest

from tests.winnow import tool_templates
from tests.winnow.chat_templates import ALL, PARTS
from winnow.answers.conversation import Conversation, shown_conversation
from winnow.answers.formats.detect import detect
from winnow.answers.formats.generic_json import GenericJson
from winnow.chat_template import ChatOptions
from winnow.marked_text import plain

TEMPLATES = ALL | tool_templates.ALL
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says what the sky does",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}


def result(number: int, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Rain or sun?"}]
MESSAGES = [
    *QUESTION,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            call(1, "get_weather", {"city": "Rome"}),
            call(2, "get_weather", {"city": "Oslo"}),
        ],
    },
    result(2, [{"type": "text", "text": "snow"}]),
    result(1, "17 degrees"),
    {"role": "assistant", "content": "Rome."},
    {"role": "user", "content": "Thanks"},
]


def rendered(
    source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] = TOOLS
) -> str:
    used = tool_templates.template(source)
    support = used.tool_support(with_tools=bool(tools))
    form = detect(support, source) or GenericJson()
    shown = shown_conversation(Conversation(messages, tools), support, form)
    return plain(used.render(shown.messages, ChatOptions(), shown.tools))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [TOOLS, []])
def test_all_of_a_conversation_is_shown_in_its_order(
    name: str, tools: list[dict[str, Any]]
) -> None:
    text = rendered(TEMPLATES[name], MESSAGES, tools)
    results = ("17 degrees", "snow") if name in ("llama", "harmony") else ("snow", "17 degrees")
    order = ("Rain or sun?", "Rome", *results, "Rome.", "Thanks")
    place = 0
    for words in order:
        place = text.index(words, place) + 1
    for words in ("Oslo", "get_weather"):
        assert words in text
    if tools:
        assert "Says what the sky does" in text


def test_a_template_that_takes_one_call_at_a_time_gets_each_with_its_result() -> None:
    text = rendered(tool_templates.LLAMA, MESSAGES)
    order = ('"city": "Rome"', "17 degrees", '"city": "Oslo"', "snow", "Rome.")
    assert sorted(order, key=text.index) == list(order)


def test_what_a_template_does_not_show_is_put_into_words() -> None:
    text = rendered(ALL["chatml"], MESSAGES)
    assert text.startswith("<|im_start|>system\nYou can call these functions:\n")
    listed = '{"name": "get_weather", "description": "Says what the sky does", "parameters": '
    assert listed in text
    written = '[{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "get_weather"'
    assert f"<|im_start|>assistant\n{written}" in text
    results = "Result of get_weather:\nsnow\n\nResult of get_weather:\n17 degrees"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text


def test_a_system_message_comes_after_the_tools_and_none_is_made_where_there_is_none() -> None:
    system: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    text = rendered(PARTS, system + QUESTION)
    assert text.count("system") == 1
    assert text.index("get_weather") < text.index("Be brief.") < text.index("Rain")
    text = rendered(ALL["alternating"], QUESTION)
    assert "system" not in text and text.count("<|im_start|>user") == 1
    assert text.index("get_weather") < text.index("Rain")


def test_calls_of_a_template_without_them_are_written_in_its_form() -> None:
    text = rendered(tool_templates.NO_CALLS, MESSAGES)
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}' in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_that_are_no_object_are_shown_as_well(name: str) -> None:
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call(1, "f", "broken json")]},
        result(1, "no"),
    ]
    assert "broken json" in rendered(TEMPLATES[name], messages, [])


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_may_lack_ids_and_results(name: str) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": "bc"}}}]
    messages = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
    assert "bc" in rendered(TEMPLATES[name], messages, [])


def test_a_template_with_one_text_before_a_call_gets_reasoning_and_words_in_it() -> None:
    said = {"content": "I look.", "thinking": "Hm."}
    called = {"role": "assistant", "tool_calls": [call(1, "f", {"a": 1})], **said}
    messages = [*QUESTION, called, result(1, "17")]
    text = rendered(tool_templates.HARMONY, messages)
    assert "<|channel|>analysis<|message|>Hm.\n\nI look.<|end|>" in text
    several = {**called, "tool_calls": [call(1, "f", {"a": 1}), call(2, "f", {"a": 2})]}
    text = rendered(tool_templates.HARMONY, [*QUESTION, several, result(1, "17"), result(2, "18")])
    assert text.count("I look.") == 1
    assert "I look." in rendered(tool_templates.HERMES, messages)


def test_a_template_that_needs_descriptions_gets_them() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    assert "// \ntype now = " in rendered(tool_templates.HARMONY, QUESTION, [tool])
    assert "description" not in rendered(tool_templates.HERMES, QUESTION, [tool])
