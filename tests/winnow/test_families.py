"""What docs/models.md says of every causal-LM family of transformers is so."""

from pathlib import Path

import pytest

from tests.winnow.families import FAMILIES, outcome
from tests.winnow.models_page import PAGE, row, rows
from winnow.dry_run import ONE_BY_ONE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_transformers_does_or_is_refused_at_load(
    tmp_path: Path, family: str
) -> None:
    assert row(outcome(family, tmp_path)) == rows()[family]


def test_the_page_has_every_family() -> None:
    assert sorted(rows()) == FAMILIES


def test_no_family_is_refused_by_an_error_of_a_library() -> None:
    assert ONE_BY_ONE not in PAGE.read_text()
