"""Which entries stay, given each entry's score."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow.naive import by_score
from winnow.compression.base import RecompressionRule
from winnow.compression.choice import REFERENCE
from winnow.compression.heads import PagedHeads
from winnow.compression.recompress import entries_to_keep
from winnow.pruning_settings import Recompression

WINDOW, PAGE_SIZE = 3, 4


class Given(RecompressionRule):
    """A rule of given scores."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__(Recompression())
        self._scores = scores

    def scores(self, heads: PagedHeads) -> Tensor:
        return self._scores.clone()


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_each_head_keeps_its_best_up_to_its_own_budget_the_earlier_of_equals(
    heads: list[tuple[int, int]], seed: int
) -> None:
    budgets = [WINDOW + more for more, _ in heads]
    lengths = [budget + excess for budget, (_, excess) in zip(budgets, heads, strict=True)]
    width = -(-max(lengths) // PAGE_SIZE)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (len(heads), width * PAGE_SIZE), generator=generator).float()
    paged = PagedHeads(
        queries=torch.empty(len(heads), 1, WINDOW, 8),
        keys=torch.empty(1, PAGE_SIZE, 8),
        pages=torch.zeros(len(heads), width, dtype=torch.int64),
        lengths=torch.tensor(lengths),
        scaling=1.0,
        kernels=REFERENCE,
    )
    kept = entries_to_keep(paged, Given(scores), torch.tensor(budgets), min(budgets), max(budgets))
    for own, entries, length, budget in zip(scores, kept, lengths, budgets, strict=True):
        best = by_score(own[: length - WINDOW].tolist())[: budget - WINDOW]
        assert entries[:budget].tolist() == sorted(best) + list(range(length - WINDOW, length))
    assert int(kept.max()) < scores.shape[1]
