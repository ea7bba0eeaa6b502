from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow.sampling.reference import probabilities
from winnow.sampling import filters
from winnow.sampling.blocks import at, block_maxima, block_sums, first_best, top_tokens
from winnow.sampling.filters import Filters, Kind
from winnow.sampling.threshold_search import ThresholdSearch
from winnow.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, Kind.UNFILTERED),
        ({"min_p": 0.1}, Kind.MIN_P),
        ({"min_p": 0.1, "top_k": 1024, "top_p": 0.5}, Kind.SORTED),
        ({"top_k": 1025}, Kind.SEARCHED),
        ({"top_p": 0.5}, Kind.SEARCHED),
    ],
)
def test_only_rows_with_a_short_top_k_sort(changes: dict[str, Any], kind: Kind) -> None:
    assert Kind.of(SamplingParams(**changes)) is kind


def kept(params: SamplingParams, logits: Tensor) -> list[bool]:
    """Which tokens the cut of one row keeps."""
    rows = logits[None]
    filters_of_row = Filters.of([params], logits.device)
    cut = filters_of_row.cut(rows, block_maxima(rows))
    assert cut is not None
    ties = logits == cut.threshold[0]
    keeps = (logits > cut.threshold[0]) | (ties & (ties.cumsum(-1) <= cut.num_ties[0]))
    best = rows.amax(-1, keepdim=True)
    weights = ((rows - best) / params.temperature).exp()
    totals, _ = cut.shares(rows, best, filters_of_row.scale)
    assert torch.allclose(totals, block_sums(weights * keeps), rtol=1e-5)
    return list(keeps.tolist())


@settings(max_examples=200)
@given(
    st.lists(st.integers(-12, 12), min_size=1, max_size=600),
    st.fixed_dictionaries(
        {
            "top_k": st.integers(0, 700),
            "top_p": st.sampled_from([0.013, 0.337, 0.7771, 0.9013, 1.0]),
            "min_p": st.sampled_from([0.0, 0.0173, 0.311, 1.0]),
            "temperature": st.sampled_from([0.5, 1.0, 1.9]),
        }
    ),
    st.booleans(),
)
def test_what_is_kept_is_what_a_stable_sort_keeps(
    logits: list[int], changes: dict[str, Any], search: bool
) -> None:
    """With many ties, sorted and searched."""
    params = SamplingParams(**changes)
    if Kind.of(params) is Kind.UNFILTERED:
        return
    values = torch.tensor(logits, dtype=torch.float32) / 2
    expected = probabilities(values, params) > 0
    with pytest.MonkeyPatch.context() as patch:
        if search:
            patch.setattr(filters, "_MAX_SORTED", 0)
        assert kept(params, values) == expected.tolist()


@pytest.mark.parametrize(
    "changes", [{"top_k": 1500}, {"top_p": 0.9}, {"top_k": 1200, "top_p": 0.95}]
)
def test_the_search_finds_the_threshold_to_the_last_bit(changes: dict[str, Any]) -> None:
    logits = torch.randn(9000, generator=torch.Generator().manual_seed(5)) * 3
    params = SamplingParams(**changes)
    expected = probabilities(logits, params) > 0
    assert kept(params, logits) == expected.tolist()


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_the_mass_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = torch.randn(4, 40_000, generator=torch.Generator().manual_seed(6))
    ones = torch.ones(4, 1)

    def mass(rows: slice) -> Tensor:
        own, best = logits[rows], ones[rows] * 5
        search = ThresholdSearch(own, (own - best).exp(), best, ones[rows].double())
        return search.mass(search.by_count(ones[rows].double() * 30_000))

    alone = torch.cat([mass(slice(row, row + 1)) for row in range(4)])
    assert torch.equal(mass(slice(4)), alone)


@given(st.lists(st.sampled_from([-1e30, -2.5, -0.0, 0.0, 1.0, 7.25]), min_size=1, max_size=900))
def test_blocks_say_what_the_whole_row_says(values: list[float]) -> None:
    logits = torch.tensor([values, values[::-1]])
    maxima = block_maxima(logits)
    assert torch.equal(maxima.amax(-1), logits.amax(-1))
    assert first_best(logits, maxima).tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(block_sums(logits).sum(-1), logits.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("size", [5, 256, 257, 30_000])
def test_top_tokens_are_those_of_a_sort(size: int) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    count = min(size, 20)
    values, ids = top_tokens(logits, block_maxima(logits), count)
    assert torch.equal(values, logits.sort(-1, descending=True).values[:, :count])
    assert torch.equal(logits.gather(1, ids), values)


def test_ids_beyond_the_vocabulary_have_a_value_of_their_own() -> None:
    found = at(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 2, 0, 9]]), -5.0)
    assert found.tolist() == [[2.0, -5.0, 1.0, -5.0]]
