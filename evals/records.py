"""A run's folder: settings.json has the settings, samples.jsonl one answer per line.

A run that was killed is resumed from its folder; an incomplete last line is dropped.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from evals.model import AnswerStats
from winnow.errors import InvalidSetting

SETTINGS_FILE = "settings.json"
SAMPLES_FILE = "samples.jsonl"

# Task, length, index, method, budget: identifies one answer.
Key = tuple[str, int, int, str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(AnswerStats):
    """One answer and its score (0 to 1).

    method, budget: the variant as requested; no budget for `full`.
    depth: of the needle, 0 (beginning) to 1 (end), if the task varies it.
    """

    task: str
    length: int
    index: int
    method: str
    budget: int | None
    depth: float | None
    answer: str
    references: tuple[str, ...]
    score: float

    @property
    def key(self) -> Key:
        return (self.task, self.length, self.index, self.method, self.budget)


_NAMES = {field.name for field in fields(Record)}


class RunFolder:
    """The records of one run, open for appending; a context manager that locks the folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises InvalidSetting if the folder has another run, is in use or cannot be written."""
        self.folder = folder
        self.records: list[Record] = []
        try:
            self._begin(settings)
        except OSError as error:
            raise _unusable(folder, error) from error

    def _begin(self, settings: Mapping[str, Any]) -> None:
        require_same_run(self.folder, settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS_FILE, settings)
        self._file = (self.folder / SAMPLES_FILE).open("a+b")
        try:
            _lock(self._file, self.folder)
            self.records = _read(self._file)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        """Append a record and flush it to the file."""
        self.records.append(record)
        self._file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write the file atomically."""
    written = file.with_name(file.name + ".new")
    written.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    written.replace(file)


def require_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InvalidSetting if the folder has a run with other settings."""
    try:
        if (folder / SETTINGS_FILE).exists():
            _require_same(folder, settings)
        elif (folder / SAMPLES_FILE).exists():
            raise InvalidSetting(
                f"output folder {folder} has {SAMPLES_FILE} but no {SETTINGS_FILE}", param="output"
            )
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> InvalidSetting:
    return InvalidSetting(
        f"output folder {folder} cannot be used: {error.strerror}", param="output"
    )


def _require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InvalidSetting, naming what differs, if the folder's run has other settings."""
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        asked = json.loads(json.dumps(settings))
        differing = [name for name in sorted(found | asked) if found.get(name) != asked.get(name)]
    except (ValueError, TypeError) as error:
        raise InvalidSetting(
            f"{folder / SETTINGS_FILE} is not what a run writes", param="output"
        ) from error
    if differing:
        name = differing[0]
        raise InvalidSetting(
            f"output folder {folder} holds a run with other settings: {name} is "
            f"{_shown(found.get(name))} there, {_shown(asked.get(name))} here",
            param="output",
        )


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidSetting(
            f"output folder {folder} is being written by another run", param="output"
        ) from error


def _read(file: IO[bytes]) -> list[Record]:
    """Read the records of all complete lines; truncate an incomplete last one."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    lines = content[:whole].splitlines()
    return [_parse(line, number, file.name) for number, line in enumerate(lines, 1)]


def _parse(line: bytes, number: int, name: str) -> Record:
    try:
        values = json.loads(line)
        if values.keys() != _NAMES:
            raise ValueError("other fields")
        values["references"] = tuple(values["references"])
        values["rho"] = tuple((layer_idx, rho) for layer_idx, rho in values["rho"])
        return Record(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidSetting(f"{name}, line {number}, is not a record", param="output") from error
