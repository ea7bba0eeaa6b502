"""Over many draws, tokens have the probabilities that the reference says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.winnow.sampling.draws import (
    ENDS,
    GENERATED,
    PROMPT,
    SETTINGS,
    assert_shares,
    draws,
    few,
    many,
)
from tests.winnow.sampling.reference import probabilities
from winnow.sampling import filters
from winnow.sampling_params import SamplingParams


@pytest.mark.parametrize("logits", [few(), many()], ids=["few", "many"])
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_shares_are_the_probabilities(changes: dict[str, Any], logits: Tensor) -> None:
    params = SamplingParams(max_tokens=100, **changes)
    expected = probabilities(logits, params, PROMPT, GENERATED, ENDS)
    assert_shares(draws(params, logits), expected)


@pytest.mark.parametrize("changes", [{"top_k": 8, "top_p": 0.7}, {"top_k": 5, "min_p": 0.4}])
def test_shares_are_the_same_where_nothing_is_sorted(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(**changes)
    expected = draws(params, few())
    monkeypatch.setattr(filters, "_MAX_SORTED", 0)
    assert torch.equal(draws(params, few()), expected)


def test_rare_tokens_have_their_share_too() -> None:
    """100,000 tokens of which each has a probability of 1e-6, and one that has 0.9."""
    logits = torch.full((100_001,), 1e-6).log()
    logits[0] = torch.tensor(0.9).log()
    found = torch.cat([draws(SamplingParams(), logits, 200, seed) for seed in range(10)])
    assert 130 <= int((found > 0).sum()) <= 270  # 200 are expected, with a deviation of 13
    assert len(set(found[found > 0].tolist())) >= 125
    halves = (found[found > 0] <= 50_000).double()
    assert 0.35 < float(halves.mean()) < 0.65


def test_one_position_s_noise_says_nothing_of_the_next() -> None:
    found = draws(SamplingParams(temperature=1.5), few())
    pairs = found[:-1] * len(few()) + found[1:]
    single = probabilities(few(), SamplingParams(temperature=1.5))
    assert_shares(pairs, torch.outer(single, single).flatten())
