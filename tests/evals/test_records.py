import json
from dataclasses import replace
from pathlib import Path

import pytest

from evals.records import SAMPLES_FILE, SETTINGS_FILE, Record, RunFolder, require_same_run
from tests.evals.synthetic import make_records
from winnow.errors import InvalidSetting

SETTINGS = {"tasks": ["vt"], "seed": 3, "budgets": [64]}


@pytest.fixture
def records() -> list[Record]:
    return make_records(tasks=("vt", "niah"), num_samples=1)


def write(folder: Path, records: list[Record]) -> None:
    with RunFolder(folder, SETTINGS) as run:
        for record in records:
            run.append(record)


def test_what_was_written_is_read_back(tmp_path: Path, records: list[Record]) -> None:
    write(tmp_path / "run", records)
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        assert run.records == records
        run.append(replace(records[0], index=7))
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        assert len(run.records) == len(records) + 1


def test_a_record_is_on_disk_at_once(tmp_path: Path, records: list[Record]) -> None:
    with RunFolder(tmp_path, SETTINGS) as run:
        for count, record in enumerate(records, 1):
            run.append(record)
            assert (tmp_path / SAMPLES_FILE).read_bytes().count(b"\n") == count


@pytest.mark.parametrize("kept_bytes", [1, 10, 200])
def test_a_torn_last_line_is_dropped(
    tmp_path: Path, records: list[Record], kept_bytes: int
) -> None:
    write(tmp_path, records)
    file = tmp_path / SAMPLES_FILE
    whole = file.read_bytes()
    file.write_bytes(whole + whole.splitlines()[0][:kept_bytes])
    with RunFolder(tmp_path, SETTINGS) as run:
        assert run.records == records
        run.append(records[0])
    assert file.read_bytes() == whole + whole.splitlines(keepends=True)[0]


@pytest.mark.parametrize("line", [b"{}", b"[1]", b'{"task": 3', b"7"])
def test_refuses_a_broken_line_by_its_number(
    tmp_path: Path, records: list[Record], line: bytes
) -> None:
    write(tmp_path, records[:2])
    with (tmp_path / SAMPLES_FILE).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InvalidSetting, match="line 3, is not a record"):
        RunFolder(tmp_path, SETTINGS)


def test_refuses_the_folder_of_another_run(tmp_path: Path, records: list[Record]) -> None:
    write(tmp_path, records)
    with pytest.raises(InvalidSetting, match="other settings: seed is 3 there, 4 here"):
        RunFolder(tmp_path, SETTINGS | {"seed": 4})
    with pytest.raises(InvalidSetting, match='model is null there, "m" here'):
        RunFolder(tmp_path, SETTINGS | {"model": "m"})
    assert json.loads((tmp_path / SETTINGS_FILE).read_text()) == SETTINGS


def test_refuses_a_folder_that_another_run_writes(tmp_path: Path) -> None:
    with RunFolder(tmp_path, SETTINGS), pytest.raises(InvalidSetting, match="another run"):
        RunFolder(tmp_path, SETTINGS)
    with RunFolder(tmp_path, SETTINGS) as run:
        assert run.records == []


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"'])
def test_refuses_settings_that_no_run_writes(tmp_path: Path, content: str) -> None:
    (tmp_path / SETTINGS_FILE).write_text(content)
    with pytest.raises(InvalidSetting, match="is not what a run writes"):
        RunFolder(tmp_path, SETTINGS)


def test_refuses_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSetting, match="file cannot be used"):
        RunFolder(tmp_path / "file", SETTINGS)
    (tmp_path / "taken" / SETTINGS_FILE).mkdir(parents=True)
    with pytest.raises(InvalidSetting, match="taken cannot be used"):
        require_same_run(tmp_path / "taken", SETTINGS)
    (tmp_path / SAMPLES_FILE).write_text("")
    with pytest.raises(InvalidSetting, match=r"has samples\.jsonl but no settings\.json"):
        RunFolder(tmp_path, SETTINGS)
