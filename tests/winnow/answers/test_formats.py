"""Forms of calls: found by the template, written, and enforced by a grammar that matches them."""

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from tests.winnow import tool_templates
from tests.winnow.chat_templates import ALL
from winnow.answers.formats.base import ToolFormat
from winnow.answers.formats.detect import detect, named
from winnow.answers.formats.generic_json import GenericJson
from winnow.answers.formats.harmony import Harmony
from winnow.answers.formats.hermes import Hermes
from winnow.answers.formats.llama3_json import Llama3Json
from winnow.answers.formats.mistral import Mistral
from winnow.grammar.compose import Tags, compose
from winnow.grammar.source import schema_grammar
from winnow.tool_support import ToolSupport


def support(source: str) -> ToolSupport:
    return tool_templates.template(source).tool_support(with_tools=True)


@pytest.mark.parametrize(
    ("name", "form", "shows"),
    [
        ("hermes", "hermes", "tools object text parallel results system"),
        ("llama", "llama3_json", "tools object text results system"),
        ("mistral", "mistral", "tools object text parallel results system"),
        ("mistral_named", "mistral", "tools object text parallel results system"),
        ("no_calls", "hermes", "tools results system"),
        ("no_tools", None, "text parallel results system"),
        ("tags", None, "tools object parallel results system"),
        ("harmony", "harmony", "tools object text results system"),
    ],
)
def test_the_form_of_calls_is_found_by_what_the_template_shows(
    name: str, form: str | None, shows: str
) -> None:
    source = tool_templates.ALL[name]
    found, shown = detect(support(source), source), support(source)
    assert (found and found.name) == form
    flags = {
        "tools": shown.tools,
        "object": shown.object_arguments,
        "text": shown.text_arguments,
        "parallel": shown.parallel_calls,
        "results": shown.results,
        "system": shown.system,
    }
    assert " ".join(name for name, is_shown in flags.items() if is_shown) == shows


@pytest.mark.parametrize("name", ALL)
def test_a_template_without_tools_is_told_of_the_general_form(name: str) -> None:
    shown = support(ALL[name])
    assert not shown.tools and not shown.calls
    assert isinstance(detect(shown, ALL[name]), GenericJson)


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{{ tools }} <tool_call>\n{json}", "hermes"),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} Environment: ipython", "llama3_json"),
        ("{{ tools }}", "json"),
        ("{{ tools }} <|channel|>final<|message|> <tool_call>", "harmony"),
        ("{{ tools }} <tool_call><function=f>", None),
        ("{{ tools }} <tool_call>f<arg_key>", None),
    ],
)
def test_without_calls_the_form_is_what_the_template_speaks_of(
    source: str, form: str | None
) -> None:
    found = detect(support(source), source)
    assert (found and found.name) == form


def test_an_operator_names_the_form() -> None:
    for name in ("hermes", "llama3_json", "mistral", "harmony", "json"):
        assert named(name, "").name == name
    calls = [{"function": {"name": "f", "arguments": {}}}]
    assert named("mistral", tool_templates.MISTRAL_NAMED).written(calls) == "[TOOL_CALLS]f[ARGS]{}"


def test_ids_are_unique_and_those_of_mistral_nine_letters_and_digits() -> None:
    assert len({Hermes().new_id() for _ in range(100)}) == 100
    assert Hermes().new_id().startswith("call_")
    assert Hermes().template_id("call_1") == "call_1"
    new = Mistral().new_id()
    assert len(new) == 9 and new.isalnum() and Mistral().template_id(new) == new
    other = Mistral().template_id("call_1")
    assert len(other) == 9 and other.isalnum() and other == Mistral().template_id("call_1")
    assert other != Mistral().template_id("call_2")


SPECIAL = (
    *("</s>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<|channel|>", "<|constrain|>", "<|message|>"),
)


class Bytes:
    """A vocabulary of bytes and some control tokens, as llguidance reads one."""

    tokens: ClassVar = [
        *(bytes([byte]) for byte in range(256)),
        *(text.encode() for text in SPECIAL),
    ]
    special_token_ids: ClassVar = list(range(256, 256 + len(SPECIAL)))
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


VOCABULARY = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=len(Bytes.tokens))
TOOLS: Sequence[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get.weather-1",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"City": {"enum": ["Rome", 'a "b" {é}']}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]


def added(text: str) -> int | None:
    return 256 + SPECIAL.index(text) if text in SPECIAL else None


def accepts(
    form: ToolFormat,
    text: str,
    *,
    parallel: bool = True,
    tools: Sequence[dict[str, Any]] = TOOLS,
    token_id: Callable[[str], int | None] = added,
) -> bool:
    """Whether the grammar takes the text and may end after it."""
    rules = form.grammar(tools, parallel, token_id)
    matcher = LLMatcher(
        VOCABULARY, LLMatcher.grammar_from_lark(f"start: {rules.start}\n{rules.rules}\n")
    )
    assert not matcher.is_error(), matcher.get_error()
    tokens: list[int] = []
    while text:
        marker = next((one for one in SPECIAL if text.startswith(one)), "")
        number = token_id(marker) if marker else None
        if number is None:
            tokens += text[0].encode()
            text = text[1:]
        else:
            assert number in rules.control_token_ids
            tokens.append(number)
            text = text.removeprefix(marker)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


EMPTY: dict[str, Any] = {"type": "object", "properties": {}}
FORMS = [
    Hermes(),
    Llama3Json(),
    Mistral(),
    Mistral(named=True),
    GenericJson(),
    Harmony(),
]
ONE = {"function": {"name": "get.weather-1", "arguments": {"city": 'a "b" {é}', "days": 2}}}
TWO = [ONE, {"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token_id", [added, lambda _: None])
def test_the_grammar_takes_calls_as_they_are_written(
    form: ToolFormat, token_id: Callable[[str], int | None]
) -> None:
    for call in TWO:
        assert accepts(form, form.written([call]), token_id=token_id)
        assert accepts(form, form.written([call]), parallel=False, token_id=token_id)
    several = not isinstance(form, Llama3Json | Harmony)
    assert accepts(form, form.written(TWO), token_id=token_id) == several
    assert not accepts(form, form.written(TWO), parallel=False, token_id=token_id)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get.weather-1", {"city": "Bonn"}),
        ("get.weather-1", {}),
        ("get.weather-1", {"city": "Rome", "more": 1}),
        ("other", {}),
        ("now", {"more": 1}),
    ],
)
def test_the_grammar_takes_no_other_calls(
    form: ToolFormat, name: str, arguments: dict[str, Any]
) -> None:
    assert not accepts(form, form.written([{"function": {"name": name, "arguments": arguments}}]))
    assert not accepts(form, json.dumps(arguments))
    assert not accepts(form, "")


def test_a_tool_that_must_be_called_is_the_only_one() -> None:
    assert accepts(Hermes(), Hermes().written(TWO[1:]), tools=TOOLS[1:])
    assert not accepts(Hermes(), Hermes().written([ONE]), tools=TOOLS[1:])


def test_a_call_of_mistral_may_have_an_id() -> None:
    form = Mistral(named=True, has_id=True)
    assert accepts(form, "[TOOL_CALLS]now[CALL_ID]abcDEF123[ARGS]{}")
    assert not accepts(form, "[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}")


def test_arguments_are_an_object_whatever_the_schema() -> None:
    for schema in ({}, {"description": "anything"}, {"properties": {"a": {"type": "null"}}}):
        tools = [{"type": "function", "function": {"name": "now", "parameters": schema}}]
        assert accepts(GenericJson(), '{"name": "now", "arguments": {}}', tools=tools)
        assert not accepts(GenericJson(), '{"name": "now", "arguments": 1}', tools=tools)


@pytest.mark.parametrize("form", [GenericJson(), Llama3Json()])
@pytest.mark.parametrize("compact", [False, True])
def test_bare_calls_and_other_json_can_both_come(form: ToolFormat, compact: bool) -> None:
    body = schema_grammar(
        {"properties": {"name": {"type": "string"}, "age": {}}, "type": "object"}, compact=compact
    )
    grammar = compose(
        body,
        form.grammar(TOOLS, True, lambda _: None),
        must_call=False,
        reasoning="none",
        tags=Tags(("<think>",), "</think>"),
        token_id=lambda _: None,
    )
    assert grammar is not None
    call = {"name": "now", form.arguments_key: {}}
    for value in (call, {"age": 7}, {"name": "now"}, {"name": "Bob", "age": 7}, {}):
        spacings = {",:", ",:" if compact and value is not call else ", : "}
        for spacing in spacings:
            text = json.dumps(value, separators=(", ", ": ") if " " in spacing else (",", ":"))
            matcher = LLMatcher(VOCABULARY, LLMatcher.grammar_from_lark(grammar.source))
            tokens = list(text.encode())
            assert matcher.try_consume_tokens(tokens) == len(tokens), text
            assert matcher.is_accepting()


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_told_from_text_by_their_first_token_if_they_have_one(form: ToolFormat) -> None:
    assert form.begins_by_token(added) == (not form.syntax.bare)
    assert not form.begins_by_token(lambda _: None)


def test_a_tool_without_properties_has_no_arguments() -> None:
    own = {"type": "function", "function": {"name": "now", "parameters": EMPTY}}
    assert accepts(GenericJson(), '{"name": "now", "arguments": {}}', tools=[own])
    assert not accepts(GenericJson(), '{"name": "now", "arguments": {"a": 1}}', tools=[own])
