from itertools import count as counting

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.tasks.base import Example
from evals.tasks.fill import Supply, hide, most_that_fit
from winnow.errors import InvalidSetting


def example_of(words: list[str]) -> Example:
    return Example("words", 0, "", " ".join(words), "", "", ("answer",), 1)


def count_words(text: str) -> int:
    return sum(len(word) for word in text.split())


@given(
    costs=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    fewest=st.integers(0, 12),
    spare=st.integers(0, 2000),
)
def test_one_more_piece_would_not_fit(costs: list[int], fewest: int, spare: int) -> None:
    """Whatever the pieces cost, in cycles of any unevenness."""
    pieces = ["x" * costs[i % len(costs)] for i in range(fewest + spare + 1)]
    length = count_words(" ".join(pieces[:fewest])) + spare
    made = most_that_fit(lambda n: example_of(pieces[:n]), length, count_words, fewest)
    num_pieces = len(made.context.split())
    assert num_pieces >= fewest
    assert count_words(made.prompt()) <= length
    assert count_words(" ".join(pieces[: num_pieces + 1])) > length


def test_counts_few_prompts() -> None:
    """Each count tokenizes a whole prompt, or instances a service to."""
    lengths = []

    def count(text: str) -> int:
        lengths.append(len(text))
        return count_words(text)

    pieces = ["x" * (20 + i * 7 % 13) for i in range(6000)]
    most_that_fit(lambda n: example_of(pieces[:n]), 100_000, count)
    assert len(lengths) <= 10


def test_refuses_a_length_below_the_fewest_pieces() -> None:
    with pytest.raises(InvalidSetting, match=r"task words needs at least 12 .* room for 11"):
        most_that_fit(lambda n: example_of(["four"] * n), 11, count_words, fewest=3)


def test_pieces_are_made_once() -> None:
    supply = Supply(str(i) for i in counting())
    assert supply.first(3) == ["0", "1", "2"]
    assert supply.first(1) == ["0"]
    assert supply.first(5) == ["0", "1", "2", "3", "4"]


def test_statements_stand_at_their_depths_in_their_order() -> None:
    filler = list("abcd")
    assert hide(["1", "2"], [0.0, 1.0], filler) == ["1", "a", "b", "c", "d", "2"]
    assert hide(["1", "2"], [0.5, 0.5], filler) == ["a", "b", "1", "2", "c", "d"]
    assert hide(["1", "2"], [0.2, 0.8], []) == ["1", "2"]
