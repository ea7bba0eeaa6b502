import pytest

from evals.metrics import (
    exact_value,
    first_integer,
    first_number,
    string_match_all,
    string_match_part,
)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("the numbers are 123, 456.", ("123", "456"), 1.0),
        ("456", ("123", "456", "789", "012"), 0.25),
        ("Quick-Fox", ("quick-fox",), 1.0),
        ("quick-fox", ("QUICK-FOX",), 1.0),
        ("9123456", ("123",), 1.0),  # contained, as the benchmark has it
        ("", ("123",), 0.0),
    ],
)
def test_string_match_all_is_the_share_of_references_contained(
    answer: str, references: tuple[str, ...], score: float
) -> None:
    assert string_match_all(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "score"), [("in Normandy.", 1.0), ("NORMANDY", 1.0), ("France", 1.0), ("Rome", 0.0)]
)
def test_string_match_part_needs_one_reference(answer: str, score: float) -> None:
    assert string_match_part(answer, ("Normandy", "France")) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 01234. Remember", 1.0),
        ("is 01234, not 99999", 1.0),
        ("99999, not 01234", 0.0),
        ("1234", 0.0),
        ("012345", 0.0),
        ("-01234", 1.0),
        ("٠١٢٣٤ or 01234", 1.0),  # only ASCII digits count
        ("none", 0.0),
    ],
)
def test_first_integer_compares_the_first_run_of_digits(answer: str, score: float) -> None:
    assert first_integer(answer, ("01234",)) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("49.5", "49.5", 1.0),
        ("49", "49.5", 0.0),
        ("97, 98", "97", 1.0),
        ("97.0", "97", 1.0),
        ("098", "98", 1.0),
        ("[0, 1]", "0", 1.0),
        ("the largest", "3", 0.0),
        ("12", "none", 0.0),
        ("12", "12th", 1.0),
    ],
)
def test_first_number_compares_by_value(answer: str, reference: str, score: float) -> None:
    assert first_number(answer, (reference,)) == score


VALUE = "3d813cbb-47fb-4f2e-8a1c-1b1b1b1b1b1b"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (VALUE, 1.0),
        (f'"{VALUE}"}}\n\nKey: "other"', 1.0),
        (f"It is:{VALUE}.", 1.0),
        (VALUE.upper(), 0.0),
        (VALUE[:-1], 0.0),
        (f"{VALUE}0", 0.0),
        ("", 0.0),
    ],
)
def test_exact_value_is_a_whole_word_of_the_answer(answer: str, score: float) -> None:
    assert exact_value(answer, (VALUE,)) == score
