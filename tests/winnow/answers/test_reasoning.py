"""Reasoning told from the answer, however the text is split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.answers.parts import ReasoningPart, Split, TextPart
from winnow.answers.reasoning import ReasoningSplitter, reasoning_after
from winnow.grammar.compose import Reasoning


def split(begins: Reasoning, text: str, cuts: list[int]) -> tuple[str, str]:
    splitter = ReasoningSplitter(begins)
    parts: list[Split] = []
    while text:
        length, cuts = cuts[0], cuts[1:] or cuts
        parts += splitter.feed(text[:length])
        text = text[length:]
    parts += splitter.finish()
    reasoning = (part.text for part in parts if isinstance(part, ReasoningPart))
    return "".join(reasoning), "".join(part.text for part in parts if isinstance(part, TextPart))


@pytest.mark.parametrize(
    ("begins", "text", "reasoning", "answer"),
    [
        ("open", "Hm.\nSo.\n</think>\n\nYes.\n", "Hm.\nSo.", "Yes.\n"),
        ("open", "\n\nHm.</think>Yes", "Hm.", "Yes"),
        ("open", "cut off </thin", "cut off </thin", ""),
        ("open", "</think>Yes", "", "Yes"),
        ("open", "a </think> b <think>c</think>", "a ", " b <think>c</think>"),
        ("possible", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("possible", " \n<think>Hm", "Hm", ""),
        ("possible", "<think>\n\n</think>\n\nYes", "", "Yes"),
        ("possible", "\nYes </think> no", "", "\nYes </think> no"),
        ("possible", " <thi", "", " <thi"),
        ("none", "<think>a</think>", "", "<think>a</think>"),
    ],
)
def test_tags_and_the_line_breaks_beside_them_are_left_out(
    begins: Reasoning, text: str, reasoning: str, answer: str
) -> None:
    for length in (1, 2, 7, 100):
        assert split(begins, text, [length]) == (reasoning, answer)


@given(
    begins=st.sampled_from(["none", "possible", "open"]),
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "</th", ">", "é"])
    ).map("".join),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
def test_however_a_text_is_split_it_is_told_apart_alike(
    begins: Reasoning, text: str, cuts: list[int]
) -> None:
    whole = split(begins, text, [max(1, len(text))])
    assert split(begins, text, cuts) == whole
    if begins == "none":
        assert whole == ("", text)


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("<|assistant|>", "possible"),
        ("<|assistant|><think>\n", "open"),
        ("<|assistant|>\n<think>\n\n</think>\n\n", "none"),
        ("</think> so <|assistant|>\n", "possible"),
    ],
)
def test_the_end_of_a_prompt_tells_how_the_answer_begins(prompt: str, begins: str) -> None:
    assert reasoning_after(prompt) == begins
