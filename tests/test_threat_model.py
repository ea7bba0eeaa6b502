"""The threat model of docs/reliability.md names a test in every row, and each of them exists."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def rows() -> list[str]:
    section = PAGE.read_text().partition("## Who can reach what")[2]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def exists(file: str, name: str) -> bool:
    return any(f"def {name}(" in path.read_text() for path in TESTS.rglob(file))


def test_every_row_names_tests_that_exist() -> None:
    assert len(rows()) > 20
    for row in rows():
        named = re.findall(r"`(\w+\.py)::(\w+)`", row.split(" | ")[-1])
        assert named, row
        assert [f"{file}::{name}" for file, name in named if not exists(file, name)] == []
