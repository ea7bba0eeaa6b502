from pathlib import Path

import pytest

from evals.calibrate.prompts import agreement, read_prompts
from winnow.errors import InvalidSetting

LINES = {
    "JSON": ('{"prompt": "a"', "line 1, is not JSON"),
    "an object": ("[1]", "line 1, has no text in the field prompt"),
    "a prompt": ('{"answers": ["a"]}', "line 1, has no text in the field prompt"),
    "a text": ('{"prompt": 3}', "line 1, has no text in the field prompt"),
    "known fields": ('{"prompt": "a", "answer": "b"}', "answer is not a field; known are answers"),
    "texts": ('{"prompt": "a", "answers": [3]}', "line 1: answers must be texts"),
    "all or none": (
        '{"prompt": "a", "answers": ["b"]}\n{"prompt": "c"}',
        "1 of 2 prompts have answers; give all of them, or none",
    ),
}


@pytest.mark.parametrize("lacking", LINES)
def test_a_file_that_is_not_so_is_refused(lacking: str, tmp_path: Path) -> None:
    text, message = LINES[lacking]
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InvalidSetting, match=message):
        read_prompts(tmp_path / "p.jsonl", 8, 0)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read"):
        read_prompts(tmp_path / "p.jsonl", 8, 0)


def test_any_of_the_answers_is_right(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answers": ["one", "two"]}\n\n')
    task = read_prompts(tmp_path / "p.jsonl", 8, 0)
    assert task.metric("It is Two.", task.prompts[0].answers) == 1
    assert task.metric("It is three.", task.prompts[0].answers) == 0


@pytest.mark.parametrize(
    ("answer", "share"),
    [("a b c d", 1), ("a b x d", 0.5), ("a b", 0.5), ("", 0), ("a b c d e f g h", 0.5)],
)
def test_agreement_lasts_until_the_answers_part(answer: str, share: float) -> None:
    assert agreement(answer, ["a b c d"]) == share
