"""A conversation's text: that of transformers, in every manner of template, or a refusal."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.models_in_code import save_byte_tokenizer
from tests.winnow.chat_templates import ALL, CHATML, DATED, PARTS, THINKING
from tests.winnow.tool_templates import HARMONY, HERMES
from winnow import template_environment
from winnow.chat_template import ChatOptions, ChatTemplate
from winnow.errors import InvalidRequest, InvalidSetting
from winnow.marked_text import plain
from winnow.tokenizer import Tokenizer, load_tokenizer

Messages = list[dict[str, Any]]
QUESTION: Messages = [{"role": "user", "content": " What is 1 < 2?\n"}]
CONVERSATION: Messages = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\na greeting\n</think>\n\nHello {there}, %s!"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Well? "},
    {"role": "user", "content": 'An "é" or a \\ 漢, <b>?\n\n'},
]
SYSTEM: Messages = [{"role": "system", "content": "Be brief. "}]


def folder_with(folder: Path, template: str | list[dict[str, str]]) -> Path:
    """A tokenizer's folder; several templates are written into its configuration."""
    save_byte_tokenizer(folder)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
        return folder
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def template(source: str, **kwargs: Any) -> ChatTemplate:
    return ChatTemplate(
        {"default": source}, {"bos_token": "<s>"}, kwargs, allow_special_tokens=False
    )


def rendered(source: str, messages: Messages, **options: Any) -> str:
    return plain(template(source).render(messages, ChatOptions(**options)))


def as_parts(messages: Messages) -> Messages:
    return [
        m
        | {
            "content": [
                {"type": "text", "text": text} for text in (m["content"][:2], m["content"][2:])
            ]
        }
        for m in messages
    ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("messages", [QUESTION, CONVERSATION, SYSTEM + CONVERSATION])
def test_the_text_is_that_of_transformers(
    tmp_path: Path, name: str, begins: bool, messages: Messages
) -> None:
    folder = folder_with(tmp_path, ALL[name])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<|system|>")
    if name == "alternating" and messages[0]["role"] == "system":
        return
    expected = theirs.apply_chat_template(
        as_parts(messages) if name == "parts" else messages,
        tokenize=False,
        add_generation_prompt=begins,
        enable_thinking=False,
    )
    ours = Tokenizer(theirs, chat_template_kwargs={"enable_thinking": False})
    options = ChatOptions(add_generation_prompt=begins)
    assert ours.chat_text(messages, options) == expected
    assert ours.chat_text(as_parts(messages), options) == expected


@pytest.mark.parametrize("name", ALL)
def test_only_a_template_that_reads_parts_gets_parts(name: str) -> None:
    reads = template(ALL[name])._roles_of_parts
    assert reads == ({"user", "system", "assistant"} if name == "parts" else set())


def test_each_role_gets_the_content_that_the_template_reads() -> None:
    mixed = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}"
        "{{ m.content[0].text + m.content[-1]['text'] }}{% endif %}{% endfor %}"
    )
    assert rendered(mixed, SYSTEM + QUESTION) == "Be brief. " + " What is 1 < 2?\n" * 2
    strict = "{% for m in messages %}{{ m.content[0]['text'] + '' }}{% endfor %}"
    assert rendered(strict, QUESTION) == " What is 1 < 2?\n"


def test_further_fields_of_a_message_are_there_for_the_template() -> None:
    source = "{% for m in messages %}{{ m.name }}|{{ m.tool_calls is defined }}{% endfor %}"
    message = {"role": "user", "content": "a", "name": "Ann", "tool_calls": None}
    assert rendered(source, [message]) == "Ann|False"


def test_kwargs_of_a_request_are_over_the_operators() -> None:
    source = "{{ a }}{{ b.c }}{{ d is defined }}"
    ours = template(source, a=1, b={"c": 2})
    assert ours.render(QUESTION, ChatOptions()) == "12False"
    assert ours.render(QUESTION, ChatOptions(template_kwargs={"a": "x", "d": None})) == "x2True"


@pytest.mark.parametrize("begins", [None, True, False])
def test_thinking_is_switched_by_a_kwarg(begins: bool | None) -> None:
    def end(thinking: bool) -> str:
        kwargs = {"enable_thinking": thinking}
        options = {"add_generation_prompt": begins, "template_kwargs": kwargs}
        return rendered(THINKING, QUESTION, **options).partition("<|im_end|>\n")[2]

    empty = "" if begins is False else "<|im_start|>assistant\n"
    assert end(thinking=True) == empty
    assert end(thinking=False) == (empty and f"{empty}<think>\n\n</think>\n\n")


def test_how_much_to_reason_is_told_to_a_template_that_knows_of_it() -> None:
    def reasoned(source: str, effort: str | None, **kwargs: Any) -> str:
        return rendered(source, QUESTION, reasoning_effort=effort, template_kwargs=kwargs)

    for effort, shown in (("high", "high"), ("", "medium"), (None, "medium")):
        assert f"Reasoning: {shown}\n" in reasoned(HARMONY, effort)
    assert "Reasoning: low\n" in reasoned(HARMONY, "high", reasoning_effort="low")
    closed = "<think>\n\n</think>\n\n"
    assert reasoned(THINKING, "none").endswith(closed)
    assert not reasoned(THINKING, "low").endswith(closed)
    assert not reasoned(THINKING, "none", enable_thinking=True).endswith(closed)
    picky = "{% if reasoning_effort not in [none, 'high'] %}{{ raise_exception('no') }}{% endif %}"
    known = (
        "{% set reasoning_effort = reasoning_effort or none %}" + picky + "{{ reasoning_effort }}"
    )
    assert (reasoned(known, "high"), reasoned(known, "low")) == ("high", "None")


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "add_generation_prompt"])
def test_a_name_with_a_meaning_of_its_own_is_no_kwarg(name: str) -> None:
    with pytest.raises(InvalidSetting, match=f"chat_template_kwargs has '{name}'"):
        ChatOptions(template_kwargs={name: 1})
    with pytest.raises(InvalidSetting, match=f"chat_template_kwargs has '{name}'"):
        template(CHATML, **{name: 1})


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (CHATML, "It is ", "<|im_start|>assistant\nIt is "),
        (CHATML, "<|im_end|>", "<|im_start|>assistant\n<|im_end|>"),
        (DATED, " It is ", "<|im_start|>assistant\n\nIt is"),
        (PARTS, "It is\n", "<|im_start|>assistant: It is\n"),
        (THINKING, "It", "<|im_start|>assistant\n<think>\n\n</think>\n\nIt"),
        (THINKING, "<think>\nso\n</think>\n\nIt", "assistant\n<think>\nso\n</think>\n\nIt"),
        ("{% for m in messages %}{{ m.content | upper }}!{% endfor %}", "it", "!IT"),
        ("{{ messages[-1].content }}|{{ messages[-1].content }}|", "it", "it|it"),
    ],
)
def test_the_last_message_is_left_open_where_it_is_to_be_continued(
    source: str, content: str, expected: str
) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": content}]
    assert rendered(source, messages, continue_final_message=True).endswith(expected)
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert rendered(source, messages, **options).endswith(expected)


def test_parts_are_continued_at_the_end_of_the_last() -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "It is so"}]
    for source in (CHATML, PARTS):
        continued = rendered(source, as_parts(messages), continue_final_message=True)
        assert continued.endswith("It is so")


def test_it_is_either_continued_or_begun() -> None:
    with pytest.raises(InvalidRequest, match="are both true"):
        ChatOptions(add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("content", ["", "  "])
def test_a_message_of_which_nothing_is_shown_cannot_be_continued(content: str) -> None:
    with pytest.raises(InvalidRequest, match="shows no text of the last message"):
        rendered(
            DATED,
            [*QUESTION, {"role": "assistant", "content": content}],
            continue_final_message=True,
        )


FAILURES = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0].foo.bar }}": "has no attribute 'foo'",
    "{{ 'a' + 1 }}": "TypeError: can only concatenate str",
    "{{ messages[0].content + none }}": "TypeError",
    "{{ messages[5]['content'] + 'a' }}": "list object has no element 5",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ messages | first | sum }}": "TypeError",
    "{{ 'a' | nofilter }}": "chat template is broken: line 1: No filter named 'nofilter'",
    "{% for m in messages %}": "chat template is broken: line 1: Unexpected end of template",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ namespace(__class__=1) }}": "no name like '__class__'",
    "{{ range(10000000) | list }}": "Range too big",
    "{{ 'x' * 100000000 }}": "a text of more than 67,108,864 characters",
    "{{ '%80000000d' % 1 }}": "a text of more than 67,108,864 characters",
    "{{ '%*d' % (80000000000, 1) }}": "a text of more than 67,108,864 characters",
    "{{ '{:>80000000000}'.format('x') }}": "a text of more than 67,108,864 characters",
    "{{ '{:{}}'.format('x', 80000000000) }}": "a text of more than 67,108,864 characters",
    "{{ '%80000000000s' | format('x') }}": "a text of more than 67,108,864 characters",
    "{{ 'x'.ljust(80000000000) }}": "a text of more than 67,108,864 characters",
    "{{ 'x' | center(80000000000) }}": "a text of more than 67,108,864 characters",
    "{{ 'x' | indent(width=80000000000, first=true) }}": "a text of more than 67,108,864",
    "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}": "a text of more than",
    "{{ 10 ** 100000 }}": "a power over 64",
    "{{ messages[0].content.encode() }}": "cannot take the bytes",
    "{% include 'other' %}": "no loader",
}


@pytest.mark.parametrize(
    ("source", "text"),
    {
        "{{ '%d at 5551234567' % 80000000000 }}": "80000000000 at 5551234567",
        "{{ '{} of {:>3}'.format(80000000000, 7) }}": "80000000000 of   7",
        "{{ 80000000000 | string }}": "80000000000",
        "{{ ['80000000000'] | join('%80000000000d') }}": "80000000000",
    }.items(),
)
def test_large_numbers_that_are_no_widths_are_text(source: str, text: str) -> None:
    assert rendered(source, QUESTION) == text


@pytest.mark.parametrize(("source", "reason"), FAILURES.items())
def test_whatever_a_template_raises_is_a_refusal_in_one_line(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        rendered(source, QUESTION)
    assert reason in error.value.message
    assert error.value.message.startswith("the model's chat template ")
    assert "InvalidRequest" not in error.value.message
    assert error.value.param == "messages"
    assert "\n" not in error.value.message and "Traceback" not in error.value.message
    assert len(error.value.message) < 400


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in m %}{% for b in m %}{% for c in m %}{{ c.role }}{% endfor %}{% endfor %}"
        "{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_environment, "MAX_SECONDS", 0.3)
    started_s = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"runs for more than 0\.3 seconds"):
        rendered("{% set m = messages * 3000 %}" + loop, QUESTION)
    assert time.monotonic() - started_s < 5


def test_a_long_refusal_does_not_repeat_the_whole_message() -> None:
    with pytest.raises(InvalidRequest) as error:
        rendered(
            "{{ raise_exception(messages[0].content) }}", [{"role": "user", "content": "z" * 10**5}]
        )
    assert len(error.value.message) < 400


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, NAMED)
    assert load_tokenizer(folder).chat_text(QUESTION) == "D"


def test_with_tools_the_template_of_that_name_is_used(tmp_path: Path) -> None:
    ours = load_tokenizer(folder_with(tmp_path, NAMED))
    tool = {"type": "function", "function": {"name": "f"}}
    assert ours.chat_text(QUESTION, tools=[tool]) == "T"
    assert ours.chat_template.source(with_tools=True) == "T"


def test_tools_are_rendered_as_transformers_does(tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder_with(tmp_path, HERMES))
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": ["é", 1]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}] * 2
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": "é", "a": [1.5]}}}
    messages = [
        *SYSTEM,
        *QUESTION,
        {"role": "assistant", "content": "So.", "tool_calls": [call, call]},
        {"role": "tool", "content": "17"},
        {"role": "tool", "content": "18"},
    ]
    expected = theirs.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert Tokenizer(theirs).chat_text(messages, tools=tools) == expected


def test_further_templates_may_have_files_of_their_own(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert load_tokenizer(folder).chat_text(QUESTION) == "D"
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_text(QUESTION) == "T"


def test_several_templates_without_a_default_are_named(tmp_path: Path) -> None:
    templates = [{"name": "rag", "template": "R"}, NAMED[0]]
    with pytest.raises(
        InvalidRequest, match="chat templates rag, tool_use, but none is its default"
    ):
        load_tokenizer(folder_with(tmp_path, templates)).chat_text(QUESTION)
