"""What the pages say of the code is so."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, code_blocks, first_column, section
from winnow.catalog import COMPRESSIONS, METHODS, RECOMPRESSIONS
from winnow.pruning_settings import PruningSettings

TOP = ("winnow/", "services/", "evals/", "training/", "proto/", "deploy/", "tests/", "benchmarks/")


def test_the_readme_fits_in_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 158


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """Of names in backticks that begin with a folder of ours; `peak` is a recipe's own."""
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", page.read_text())
    ours = {name for name in named if name.startswith(TOP) and "peak" not in name}
    assert sorted(name for name in ours if not (ROOT / name).exists()) == []


def test_the_way_of_a_request_names_a_file_in_each_step() -> None:
    steps = re.split(r"^\d+\. ", section("architecture.md", "## A request's way"), flags=re.M)[1:]
    assert len(steps) > 10
    closing = steps.pop()
    assert [step for step in steps if not re.search(r"`[\w/]+\.(py|proto)`", step)] == []
    assert "usage.py" in closing


def test_the_rules_of_imports_name_the_rooms_that_are_tested() -> None:
    rooms = re.findall(
        r"^\| `([\w/]+)/`|`(services/\w+)/`",
        section("architecture.md", "## What must not depend on what"),
        re.M,
    )
    named = {first or second for first, second in rooms}
    assert {"winnow", "evals", "services/prefill", "services/decode", "services/cli"} <= named


def test_the_table_of_methods_has_a_row_for_each() -> None:
    assert sorted(first_column(section("methods.md", "## The methods"))) == sorted(METHODS)


def test_the_table_of_parameters_has_a_row_for_each_with_its_default() -> None:
    table = section("methods.md", "## The `winnow` parameters")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.M))
    defaults = {setting.name: setting.default for setting in fields(PruningSettings)}
    assert list(rows) == list(defaults)
    written = {None: ("unset", "null"), True: ("true",), False: ("false",)}
    for name, default in defaults.items():
        accepted = written.get(default) if default is None or default is False else None
        assert rows[name].strip("`") in (accepted or (str(default),)), name


def test_the_parameters_name_every_rule() -> None:
    table = section("methods.md", "## The `winnow` parameters")
    for name in (*COMPRESSIONS, *RECOMPRESSIONS):
        assert f"`{name}`" in table


@pytest.mark.parametrize(
    ("heading", "example"),
    [("## Add a method", "peak_method.py"), ("## Add a compression rule", "peak_rule.py")],
)
def test_a_recipe_shows_its_example_word_for_word(heading: str, example: str) -> None:
    code, _ = code_blocks(section("methods.md", heading), "python")
    assert code in (ROOT / "examples" / example).read_text()
