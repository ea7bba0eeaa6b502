"""Calls found in a text as it comes: all of a form's variants, and what is no call."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from winnow.answers import AnswerFormat
from winnow.answers.formats.base import ToolFormat
from winnow.answers.formats.generic_json import GenericJson
from winnow.answers.formats.harmony import Harmony
from winnow.answers.formats.hermes import Hermes
from winnow.answers.formats.llama3_json import Llama3Json
from winnow.answers.formats.mistral import Mistral
from winnow.answers.frames import CHANNELS, THINKING
from winnow.answers.json_calls import CallParser
from winnow.answers.parts import CallArguments, CallStart, Part, TextPart, joined

FORMATS: dict[str, ToolFormat] = {
    "hermes": Hermes(),
    "llama3_json": Llama3Json(),
    "mistral": Mistral(),
    "json": GenericJson(),
}
NAMES = frozenset({"f", "get_weather"})


def parts_of(
    form: str, text: str, cuts: list[int] | None = None, *, parallel: bool = True
) -> tuple[Part, ...]:
    """The parts of a text that comes in pieces of these lengths, the last one repeated."""
    ids = (f"id{idx}" for idx in itertools.count())
    parser = CallParser(FORMATS[form].syntax, NAMES, parallel=parallel, new_id=lambda: next(ids))
    parts: list[Part] = []
    lengths = itertools.chain(cuts or [], itertools.repeat(cuts[-1] if cuts else 1))
    while text:
        length = next(lengths)
        parts += parser.feed(text[:length])
        text = text[length:]
    return joined([*parts, *parser.finish()])


def told(form: str, text: str, **options: Any) -> list[Any]:
    """Texts, and calls as (name, arguments)."""
    told: list[Any] = []
    for part in parts_of(form, text, **options):
        match part:
            case TextPart(text):
                told.append(text)
            case CallStart(index, call_id, name):
                assert call_id == f"id{index}"
                told.append((name, ""))
            case CallArguments(_, arguments):
                told[-1] = (told[-1][0], told[-1][1] + arguments)
    return told


F1, W2 = ("f", '{"a": 1}'), ("get_weather", '{"b": [2]}')
CALLS: dict[str, list[tuple[str, list[Any]]]] = {
    "hermes": [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [F1]),
        ('I look.\n\n<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>\n', ["I look.", F1]),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"arguments": {"b": [2]}, "name": "get_weather"}\n</tool_call> Done.\n',
            [F1, W2, "Done.\n"],
        ),
        # A brace too many or too few, the end left out, two in one tag, tags twice.
        ('<tool_call>{"name":"f","arguments":{"a": 1}}}</tool_call>', [F1]),
        ('<tool_call>{"name":"f","arguments":{"a": 1}\n</tool_call> So.', [F1, "So."]),
        ('<tool_call>{"name":"f","arguments":{"a": 1}}', [F1]),
        (
            '<tool_call>\n{"name":"f","arguments":{"a": 1}}\n'
            '{"name":"get_weather","arguments":{"b": [2]}}\n</tool_call>',
            [F1, W2],
        ),
        (
            '<tool_call>\n<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>',
            ["<tool_call>\n", F1],
        ),
        # Strings with what looks like the end; arguments as text, as null, left out.
        (
            '<tool_call>{"name":"f","arguments":{"x":"}\\"</tool_call>{"}}</tool_call>',
            [("f", '{"x":"}\\"</tool_call>{"}')],
        ),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', [F1]),
        ('<tool_call>{"arguments":"{\\"a\\": 1}","name":"f"}</tool_call>', [F1]),
        ('<tool_call>{"name":"f","arguments":null}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":""}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"name":"f"}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":"x \\ud800"}</tool_call>', [("f", "x ?")]),
        ('<tool_call>{"name":"f","arguments":[1]}</tool_call>', [("f", "[1]")]),
        # Members beside them, and the way of OpenAI's API.
        (
            '<tool_call>{"id":"7","type":"function","name":"f","arguments":{"a": 1}}</tool_call>',
            [F1],
        ),
        (
            '<tool_call>{"type":"function","function":{"name":"f","arguments":{"a": 1}}}'
            "</tool_call>",
            [F1],
        ),
        (
            '<tool_call>{"name":"f","arguments":{"a": 1},"thought":{"x":[]}}</tool_call> So.',
            [F1, "So."],
        ),
        # Unfinished calls.
        ('<tool_call>{"name":"f","arguments":{"a": "x', [("f", '{"a": "x')]),
        ('<tool_call>{"name":"f","arg', ['<tool_call>{"name":"f","arg']),
        (
            '<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>\n<tool_call>{"name"',
            [F1],
        ),
        ('<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call> a <t', [F1, "a <t"]),
        ('<tool_call>{"name":"f","arguments":{"a": 1}}\n</tool_', [F1]),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"a": 1}}', [F1]),
        (
            '\n{"name":"f","parameters":{"a": 1}}; {"name":"get_weather","parameters":{"b": [2]}}',
            [F1, W2],
        ),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [F1]),
        ('So:\n<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ["So:", F1]),
        ('{"type":"function","function":"f","parameters":{"a": 1}}', [F1]),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', [F1]),
        (
            'Yes. [TOOL_CALLS] [{"name":"f","arguments":{"a": 1},"id":"abcdefghi"}, '
            '{"name":"get_weather","arguments":{"b": [2]}}]',
            ["Yes.", F1, W2],
        ),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{"b": [2]}', [F1, W2]),
        ('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', [F1]),
        ('[TOOL_CALLS]f {"a": 1}', [F1]),
    ],
    "json": [
        ('{"name": "f", "arguments": {"a": 1}}', [F1]),
        (
            '[{"name":"f","arguments":{"a": 1}},\n{"name":"get_weather","arguments":{"b": [2]}}]',
            [F1, W2],
        ),
        ('```json\n{"name": "f", "arguments": {"a": 1}}\n```\n', [F1]),
    ],
}
NO_CALLS: dict[str, list[str]] = {
    "hermes": [
        "  a < b <tool <tool_call\n",
        '{"name": "f", "arguments": {"a": 1}}',
        "Write <tool_call> before it.",
        '<tool_call>{"name": "unknown", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": ["f"]}</tool_call> {} []',
        '<tool_call>{"answer": 42}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>{"name" "f"}',
        '<tool_call>{"na\\me": "f"}',
    ],
    "llama3_json": [
        '<|python_tag|>search.call(query="x")',
        'So: {"name": "f", "parameters": {}}',
        '{"name": "Bob", "age": 7}',
        '{"name": "f"}',
        '{"type":"person","name":"f"}',
    ],
    "mistral": [
        "[TOOL_CALLS]what is this? [1] {2}",
        "[TOOL_CALLS]unknown[ARGS]{}",
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS]" + "f" * 1000,
        "[TOOL] [TOOL_CALLS",
    ],
    "json": [
        '[{"name": "f"}]',
        '```json\n{"name": "f"}\n```',
        "[1, 2]",
        '{"answer": 42}',
        "[]",
        " hi {",
        "```json\n[1]\n```",
        "```python\nf()\n```",
    ],
}
EVERY_CALL = [(form, text, calls) for form in CALLS for text, calls in CALLS[form]]
EVERY_TEXT = [(form, text) for form in NO_CALLS for text in NO_CALLS[form]]


@pytest.mark.parametrize(("form", "text", "calls"), EVERY_CALL)
def test_calls_are_told_from_text(form: str, text: str, calls: list[Any]) -> None:
    for length in (1, 2, 5, 1000):
        assert told(form, text, cuts=[length]) == calls


@pytest.mark.parametrize(("form", "text"), EVERY_TEXT)
def test_what_is_no_call_is_text_as_it_was(form: str, text: str) -> None:
    for length in (1, 3, 1000):
        assert told(form, text, cuts=[length]) == [text]


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "```json", "```"),
        *("[ARGS]", "[CALL_ID]", '"name"', '"f"', '"arguments"', '"parameters"', '"function"'),
        *("{", "}", "[", "]", ":", ",", ";", '"', "\\", " ", "\n", "a", "1", "null", "é"),
        *('{"name": "f", "arguments": ', '{"a": 1}', '{"name": "nobody", "arguments": {}}'),
    ]
)
ANYTHING = st.lists(PIECES | st.sampled_from([text for _, text, _ in EVERY_CALL])).map("".join)


@pytest.mark.parametrize("form", FORMATS)
@given(text=ANYTHING, cuts=st.lists(st.integers(1, 9), min_size=1), parallel=st.booleans())
@example(text='<tool_call>{"name":"f"', cuts=[3], parallel=True)
def test_however_a_text_is_split_its_parts_are_the_same(
    form: str, text: str, cuts: list[int], parallel: bool
) -> None:
    whole = parts_of(form, text, [max(1, len(text))], parallel=parallel)
    assert parts_of(form, text, cuts, parallel=parallel) == whole
    assert len({part.index for part in whole if isinstance(part, CallStart)}) <= (
        len(text) if parallel else 1
    )


@pytest.mark.parametrize("form", FORMATS)
@given(text=ANYTHING)
def test_without_a_call_no_character_is_lost(form: str, text: str) -> None:
    parts = parts_of(form, text)
    if all(isinstance(part, TextPart) for part in parts):
        assert "".join(part.text for part in parts if isinstance(part, TextPart)) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda value: (
        st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=4), value, max_size=3)
    ),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=3)
TEXTS = st.text(st.characters(exclude_characters="<[{`", exclude_categories=["Cs"]), max_size=9)


@pytest.mark.parametrize("form", FORMATS)
@given(
    calls=st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), min_size=1, max_size=3),
    before=TEXTS,
    cut=st.integers(1, 7),
)
def test_calls_as_a_model_writes_them_are_read(
    form: str, calls: list[tuple[str, Any]], before: str, cut: int
) -> None:
    written = FORMATS[form].written(
        [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    )
    is_bare = FORMATS[form].syntax.bare
    text = written if is_bare else f"{before}{written}"
    found = told(form, f"{text}\n", cuts=[cut])
    texts = [one for one in found if isinstance(one, str)]
    read = [(one[0], json.loads(one[1])) for one in found if not isinstance(one, str)]
    assert read == calls
    assert "".join(texts).strip() == ("" if is_bare else before.strip())


EVERY_FORM = [*FORMATS.values(), Mistral(named=True), Harmony()]


@pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: form.name)
@pytest.mark.parametrize("must_call", [False, True])
@pytest.mark.parametrize("length", [1, 4, 1000])
def test_wherever_an_answer_of_calls_is_cut_off_no_markup_is_text(
    form: ToolFormat, must_call: bool, length: int
) -> None:
    """Unless it may have other text, and the first call has not begun."""
    frame = CHANNELS if isinstance(form, Harmony) else THINKING
    answer = AnswerFormat(form, NAMES, must_call=must_call, frame=frame)
    call = {"function": {"name": "f", "arguments": {"a": "}<|"}}}
    text = form.written([call, call])
    for num_chars in range(len(text)):
        parser = answer.parser()
        pieces = (text[:num_chars][i : i + length] for i in range(0, num_chars, length))
        parts = [part for piece in pieces for part in parser.feed(piece)]
        parts += parser.finish()
        if must_call or any(isinstance(part, CallStart) for part in parts):
            assert not any(isinstance(part, TextPart) for part in parts), text[:num_chars]


def test_only_the_first_call_is_told_if_there_is_to_be_one() -> None:
    text = CALLS["hermes"][2][0]
    assert told("hermes", text, parallel=False) == [F1, "Done.\n"]


def test_arguments_come_as_soon_as_they_are_written() -> None:
    parser = CallParser(Hermes().syntax, NAMES, parallel=True, new_id=lambda: "x")
    assert parser.feed('Hi <tool_call>\n{"name": "f", "arguments": ') == (TextPart("Hi"),)
    assert parser.feed('{"a') == (CallStart(0, "x", "f"), CallArguments(0, '{"a'))
    assert parser.feed('": 1') == (CallArguments(0, '": 1'),)
    assert parser.feed("}}\n</tool") == (CallArguments(0, "}"),)
    assert parser.feed("_call>") == parser.finish() == ()


def test_a_long_answer_is_read_in_good_time() -> None:
    """Also one that begins a call again and again without going on with it."""
    for text in ('<tool_call>{"arguments":[[[', "<tool_call>", "\n", "<"):
        assert told("hermes", text * 20_000, cuts=[4]) == [text * 20_000]


def test_a_parser_knows_whether_it_is_within_a_call() -> None:
    parser = CallParser(Hermes().syntax, NAMES, parallel=True, new_id=lambda: "x")
    for text, within in (
        ("Hi <tool_call>", False),
        ('{"name":"f","arguments":{', True),
        ("}}", False),
    ):
        parser.feed(text)
        assert parser.in_call == within
