"""Files as the benchmarks' own scripts write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals.tasks import make_tasks
from evals.tasks.base import Task
from winnow.errors import InvalidSetting


def task_over(folder: Path, name: str) -> Task:
    return next(task for task in make_tasks(11, folder) if task.name == name)


def write_lines(file: Path, *rows: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def count_words(text: str) -> int:
    return len(text.split())


RULER_ROW = {
    "index": 0,
    "input": "Find it.\nOne needle.\nWhat is it? The needle is",
    "outputs": ["17", "18"],
    "length": 4096,
}


def test_reads_a_ruler_file_whose_input_ends_with_the_answers_beginning(tmp_path: Path) -> None:
    write_lines(tmp_path / "niah_multivalue/validation.jsonl", RULER_ROW)
    task = task_over(tmp_path, "niah_multivalue")
    example = task.example(0, 0, 100, count_words)
    assert example.prompt() == RULER_ROW["input"]
    assert example.answers == ("17", "18")
    assert example.max_new_tokens == 128
    assert task.metric("18 and 19", example.answers) == 0.5


def test_reads_a_ruler_file_with_the_answers_beginning_apart(tmp_path: Path) -> None:
    prefix = " The needle is"
    row = RULER_ROW | {"input": "Find it. What is it?", "answer_prefix": prefix}
    write_lines(tmp_path / "niah_single_1/validation.jsonl", row)
    example = task_over(tmp_path, "niah_single_1").example(0, 0, 100, count_words)
    assert example.user_message() == "Find it. What is it?"
    assert example.prompt() == "Find it. What is it? The needle is"


@pytest.mark.parametrize(("outputs", "answers"), [("abc", ("abc",)), (7, ("7",))])
def test_one_answer_need_not_be_a_list(
    tmp_path: Path, outputs: object, answers: tuple[str, ...]
) -> None:
    row = RULER_ROW | {"outputs": outputs, "answer_prefix": None}
    write_lines(tmp_path / "vt/validation.jsonl", row)
    example = task_over(tmp_path, "vt").example(0, 0, 100, count_words)
    assert example.answers == answers
    assert example.prompt() == RULER_ROW["input"]


def test_reads_infinitebenchs_pass_keys(tmp_path: Path) -> None:
    context = "The sky is blue.\nThe pass key is 01234.\nThe sky is blue.\n"
    row = {"id": 0, "context": context, "input": "What is the pass key?", "answer": ["01234"]}
    write_lines(tmp_path / "passkey.jsonl", {"not": "this"}, row)
    task = task_over(tmp_path, "passkey")
    example = task.example(1, 0, 100, count_words)
    assert example.prompt() == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n\n"
        f"{context}\n\nWhat is the pass key?\n\nThe pass key is"
    )
    assert task.metric(" 01234.", example.answers) == 1


def test_reads_infinitebenchs_keys_and_values_once(tmp_path: Path) -> None:
    question = 'Key: "a-1"\nThe value associated with the specified key is: '
    row = {"context": 'JSON data:\n{"a-1": "b-2"}', "input": question, "answer": "b-2"}
    write_lines(tmp_path / "kv_retrieval.jsonl", row)
    task = task_over(tmp_path, "kv_retrieval")
    example = task.example(0, 0, 100, count_words)
    assert example.prompt() == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{{"a-1": "b-2"}}\n\n{question}'
    )
    assert task.metric(' "b-2"}', example.answers) == 1


@pytest.mark.parametrize("what", ["largest", "second smallest", "median"])
def test_asks_infinitebenchs_numbers_in_its_words(tmp_path: Path, what: str) -> None:
    question = (
        "You should answer with only one number, no other words. "
        f"The {what} number of the list is: "
    )
    row = {"context": "[3, 1, 2]", "input": question, "answer": 2.5}
    write_lines(tmp_path / "math_find.jsonl", row)
    task = task_over(tmp_path, "math_find")
    example = task.example(0, 0, 100, count_words)
    expected = f"What is the {what} number in the following list?\n\n[3, 1, 2]\n\n{question}"
    assert example.prompt() == expected
    assert task.metric("2.5", example.answers) == 1


def test_a_line_may_hold_any_character_that_json_lets_stand(tmp_path: Path) -> None:
    text = "next\u2028line\u0085and\u2029more"
    row = {"context": text, "input": "What?", "answer": ["1"]}
    write_lines(tmp_path / "passkey.jsonl", row)
    assert task_over(tmp_path, "passkey").example(0, 0, 100, count_words).context == text


def test_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=f"{tmp_path}/vt/validation.jsonl is missing"):
        task_over(tmp_path, "vt").example(0, 0, 100, count_words)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "has 0 examples; example 1 was asked for"),
        ('{"context": \n', "example 1, is not JSON"),
        ("[1]\n", "example 1, is not a JSON object"),
        ('{"context": "c", "input": "i"}\n', "example 1, lacks answer"),
        ('{"context": "c", "input": "i", "answer": []}\n', "example 1, lacks answer"),
        ('{"context": "c", "input": "i", "answer": {"a": 1}}\n', "1, has {'a': 1} for an answer"),
        ('{"context": "c", "input": "i", "answer": ["x", null]}\n', "1, has None for an answer"),
    ],
)
def test_names_file_and_line_that_are_wrong(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "passkey.jsonl").write_text(content)
    with pytest.raises(InvalidSetting, match=f"passkey.jsonl.* {complaint}"):
        task_over(tmp_path, "passkey").example(0, 0, 100, count_words)


def test_refuses_an_example_that_is_longer_than_asked_for(tmp_path: Path) -> None:
    row = RULER_ROW | {"input": "word " * 30}
    write_lines(tmp_path / "vt/validation.jsonl", row)
    with pytest.raises(InvalidSetting, match="example 1 of vt has 30 tokens; the length is 29"):
        task_over(tmp_path, "vt").example(0, 0, 29, count_words)


def test_tasks_without_a_file_stay_generated(tmp_path: Path) -> None:
    example = task_over(tmp_path, "chain_ordered_2").example(0, 0, 500, count_words)
    assert "VAR" in example.context
