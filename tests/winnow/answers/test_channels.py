"""Answers in channels, as gpt-oss writes them: told apart however the text is split."""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from winnow.answers import AnswerFormat
from winnow.answers.channels import MARKERS, channel_after
from winnow.answers.formats.harmony import Harmony
from winnow.answers.frames import CHANNELS
from winnow.answers.parts import CallArguments, CallStart, Part, ReasoningPart, TextPart, joined
from winnow.grammar.compose import Reasoning

NAMES = frozenset({"f", "get_weather"})
NEXT = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|>" + NEXT
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
W = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"b": [2]}'


class Numbered(Harmony):
    """Its ids are the same in every answer."""

    ids: ClassVar[Iterator[int]]

    def new_id(self) -> str:
        return f"id{next(Numbered.ids)}"


def answer(reasoning: Reasoning = "possible", **changes: Any) -> AnswerFormat:
    own: dict[str, Any] = {"tool_format": Numbered(), "tool_names": NAMES} | changes
    return AnswerFormat(frame=CHANNELS, reasoning=reasoning, **own)


def parts_of(form: AnswerFormat, text: str, cuts: list[int]) -> tuple[Part, ...]:
    """The parts of a text that comes in pieces of these lengths, the last one repeated."""
    Numbered.ids = itertools.count()
    parser = form.parser()
    parts: list[Part] = []
    lengths = itertools.chain(cuts, itertools.repeat(cuts[-1]))
    while text:
        length = next(lengths)
        parts += parser.feed(text[:length])
        text = text[length:]
    return joined([*parts, *parser.finish()])


def told(form: AnswerFormat, text: str, cuts: list[int]) -> list[Any]:
    """Texts, reasoning as {text}, and calls as (name, arguments)."""
    told: list[Any] = []
    for part in parts_of(form, text, cuts):
        match part:
            case TextPart(text):
                told.append(text)
            case ReasoningPart(text):
                told.append({text})
            case CallStart(_, _, name):
                told.append((name, ""))
            case CallArguments(_, arguments):
                told[-1] = (told[-1][0], told[-1][1] + arguments)
    return told


F1, W2 = ("f", '{"a": 1}'), ("get_weather", '{"b": [2]}')


@pytest.mark.parametrize(
    ("begins", "text", "expected"),
    [
        ("possible", f"{THOUGHT}<|channel|>final<|message|>Yes.<|return|>", [{"Hm."}, "Yes."]),
        ("possible", "<|channel|>final<|message|>a\n\n<b>\n", ["a\n\n<b>\n"]),
        ("possible", f"{THOUGHT}{CALL}<|call|>", [{"Hm."}, F1]),
        ("possible", f"{THOUGHT}{CALL}", [{"Hm."}, F1]),
        # The function may be named in the header's other part, and in the channel of reasoning.
        (
            "possible",
            f'{THOUGHT} to=functions.f<|channel|>commentary json<|message|>{{"a": 1}}',
            [{"Hm."}, F1],
        ),
        (
            "possible",
            ' to=functions.f<|channel|>analysis code<|message|>{"a": 1}<|call|>',
            [F1],
        ),
        # What is said before a call is for the user; two messages of one kind are paragraphs.
        (
            "possible",
            f"{THOUGHT}<|channel|>commentary<|message|>I look.<|end|>{NEXT}{CALL}<|call|>",
            [{"Hm."}, "I look.", F1],
        ),
        (
            "possible",
            f"{THOUGHT}{THOUGHT}<|channel|>commentary<|message|>Well.<|end|>{NEXT}"
            "<|channel|>final<|message|>Yes.",
            [{"Hm.\n\nHm."}, "Well.\n\nYes."],
        ),
        ("possible", f"{CALL}<|call|>{NEXT}{W}<|call|>", [F1, W2]),
        # An end that is left out, a channel that is none of ours or is not named, no header.
        (
            "possible",
            f"<|channel|>analysis<|message|>Hm.{NEXT}<|channel|>final<|message|>Yes.",
            [{"Hm."}, "Yes."],
        ),
        ("possible", f"<|channel|>analysis<|end|>{NEXT}<|channel|>other<|message|>Yes.", ["Yes."]),
        ("possible", "<|message|>Yes.<|end|>", ["Yes."]),
        ("possible", " Yes, to=functions.f. <|end|>", [" Yes, to=functions.f. "]),
        ("possible", "to", ["to"]),
        # Cut off in a header, in what may be the end of a message, and in a call.
        ("possible", f"{THOUGHT}<|channel|>fin", [{"Hm."}]),
        ("possible", "<|channel|>final<|message|>a <|en", ["a <|en"]),
        ("possible", CALL[:-2], [("f", '{"a": ')]),
        # Goes on with a message that the prompt has begun.
        ("open", f"Hm.<|end|>{NEXT}<|channel|>final<|message|>Yes.", [{"Hm."}, "Yes."]),
        ("none", "es.<|return|>", ["es."]),
        # What is no call is text, as it was; a header that never ends is, too.
        ("possible", CALL.replace(".f", ".g"), [CALL.replace(".f", ".g")]),
        ("possible", CALL.replace("{", "("), [CALL.replace("{", "(")]),
        ("possible", "<|channel|>analysis to=python code<|message|>1 + 1<|call|>", [{"1 + 1"}]),
        ("possible", "<|channel|>" + "final " * 100, ["<|channel|>" + "final " * 100]),
    ],
)
def test_channels_are_told_apart(begins: Reasoning, text: str, expected: list[Any]) -> None:
    for cut in range(len(text)):
        assert told(answer(begins), text, [cut or 1, len(text)]) == expected
    for length in (1, 2, 7):
        assert told(answer(begins), text, [length]) == expected


PIECES = st.sampled_from(
    [
        *MARKERS,
        *("assistant", "analysis", "final", "commentary", " to=functions.f", "to=python", "json"),
        *("{", "}", "[", '"', " ", "\n", "a", "<", "<|", "|>", "é", NEXT, THOUGHT, CALL, W),
    ]
)


@given(
    begins=st.sampled_from(["none", "possible", "open"]),
    text=st.lists(PIECES).map("".join),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
@example(begins="possible", text="<|channel|>" * 30 + "<|message|>a", cuts=[1])
@example(begins="possible", text="<|channel|>" + "a" * 234 + "<|message|>a", cuts=[250, 3])
def test_however_a_text_is_split_its_parts_are_the_same(
    begins: Reasoning, text: str, cuts: list[int]
) -> None:
    for form in (answer(begins), answer(begins, tool_format=None)):
        assert parts_of(form, text, cuts) == parts_of(form, text, [max(1, len(text))])


def test_reasoning_may_be_left_out_and_calls_but_the_first() -> None:
    text = f"{THOUGHT}{CALL}<|call|>{NEXT}{W}<|call|>"
    assert told(answer(shows_reasoning=False, parallel=False), text, [3]) == [F1]


def test_without_tools_the_text_of_a_call_is_text() -> None:
    assert told(answer(tool_format=None), f"{THOUGHT}{CALL}<|call|>", [3]) == [{"Hm."}, CALL]


def test_calls_as_they_are_written_are_read() -> None:
    calls = [{"function": {"name": name, "arguments": {"a": "}<{"}}} for name in ("f", "f")]
    assert told(answer(), Harmony().written(calls), [3]) == [("f", '{"a": "}<{"}')] * 2


def test_parts_come_as_soon_as_they_are_certain() -> None:
    Numbered.ids = itertools.count()
    parser = answer().parser()
    assert parser.feed("<|channel|>analysis<|message|>H") == (ReasoningPart("H"),)
    assert parser.feed("m <") == (ReasoningPart("m "),)
    assert parser.feed(" 2<|end|><|start|>assis") == (ReasoningPart("< 2"),)
    assert parser.feed("tant<|channel|>commentary to=functions.f <|constrain|>json") == ()
    assert parser.feed('<|message|>{"a') == (CallStart(0, "id0", "f"), CallArguments(0, '{"a'))
    assert parser.in_call
    assert parser.feed('": 1}') == (CallArguments(0, '": 1}'),)
    assert not parser.in_call


def test_a_long_answer_is_read_in_good_time() -> None:
    for text in ("<|channel|>", "<|channel|>final<|message|>", "<|end|>", "\n", "<", "to="):
        parts_of(answer(), text * 4_000, [4])


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", "possible"),
        ("<|start|>assistant<|channel|>final<|message|>Hi<|end|>", "possible"),
        ("<|start|>assistant<|channel|>analysis<|message|>I ", "open"),
        ("<|start|>assistant<|channel|>final<|message|>I <", "none"),
    ],
)
def test_the_end_of_a_prompt_tells_how_the_answer_begins(prompt: str, begins: str) -> None:
    assert channel_after(prompt) == begins
