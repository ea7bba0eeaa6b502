"""The tables of docs/reliability.md name a test in every row, and each of them exists."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def rows() -> list[str]:
    """Of the tables with a column for tests."""
    found: list[str] = []
    names_tests = False
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            names_tests = False
        elif line.endswith("| test |"):
            names_tests = True
        elif names_tests and not line.startswith("|---"):
            found.append(line)
    return found


def exists(file: str, name: str) -> bool:
    return any(f"def {name}(" in path.read_text() for path in TESTS.rglob(file))


def test_every_row_names_tests_that_exist() -> None:
    assert len(rows()) > 50
    for row in rows():
        cell = row.removesuffix(" |").split(" | ")[-1]
        named = re.findall(r"`(\w+\.py)::(\w+)`", cell)
        assert named or cell == "same", row
        assert [f"{file}::{name}" for file, name in named if not exists(file, name)] == []


def test_every_file_that_the_docs_name_exists() -> None:
    for page in PAGE.parent.glob("*.md"):
        named = re.findall(r"`(tests/[\w/]*(?:\.py)?)`", page.read_text())
        assert [path for path in named if not (TESTS.parent / path).exists()] == [], page.name


def test_every_chaos_case_has_its_row() -> None:
    page = PAGE.read_text()
    for path in (TESTS / "chaos").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M):
            assert f"`{path.name}::{name}`" in page, name
