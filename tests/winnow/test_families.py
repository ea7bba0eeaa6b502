"""What docs/models.md says of every causal-LM family of transformers is so."""

from pathlib import Path

import pytest

from tests.winnow.families import FAMILIES, outcome
from tests.winnow.models_page import row, rows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_transformers_does_or_is_refused_at_load(
    tmp_path: Path, family: str
) -> None:
    assert row(outcome(family, tmp_path)) == rows()[family]


def test_the_page_has_every_family() -> None:
    assert sorted(rows()) == FAMILIES
