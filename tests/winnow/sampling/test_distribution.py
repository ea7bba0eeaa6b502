"""Over many draws, tokens have the probabilities that the reference says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.winnow.sampling.reference import probabilities, state, tokens
from winnow.sampling import filters
from winnow.sampling_params import SamplingParams

ENDS = (2, 3)
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 2": {"temperature": 2.0},
    "top-k": {"top_k": 8},
    "top-k of more than the vocabulary": {"top_k": 100_000},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "top-k, then top-p": {"top_k": 12, "top_p": 0.7},
    "all filters": {"top_k": 15, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "a long top-k, then top-p, and min-p": {"top_k": 1100, "top_p": 0.95, "min_p": 0.001},
    "repetition penalty": {"repetition_penalty": 1.5},
    "presence penalty": {"presence_penalty": 1.0},
    "frequency penalty": {"frequency_penalty": -0.5},
    "biases": {"logit_bias": {1: 2.0, 5: -3.0}},
    "min_tokens": {"min_tokens": 10, "stop_token_ids": frozenset({5})},
    "everything": {
        "temperature": 0.9,
        "top_k": 14,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.1,
        "logit_bias": {4: 1.0, 11: 1.0},
        "min_tokens": 10,
    },
}
PROMPT, GENERATED = (0, 1, 1, 4), (1, 6, 6, 6)
COUNT = 3000


def few() -> Tensor:
    """A small vocabulary with ties."""
    return torch.tensor([3, 2.5, 3, -1, 0, 2, 2, 2, 1, 1.5, 0, 2, 2, -2, 1, 0.5, 2, 1, 0, 2])


def many() -> Tensor:
    """Several blocks, of which the last is short, and a long tail."""
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(4)) * 2
    logits[:20] = few() + 3
    return logits


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


def draws(params: SamplingParams, logits: Tensor, count: int = COUNT, seed: int = 11) -> Tensor:
    """Tokens at `count` positions."""
    states = [
        state(params, position + 4, prompt=PROMPT, generated=GENERATED, seed=seed)
        for position in range(count)
    ]
    return torch.tensor(tokens(logits.expand(count, -1), states, ENDS))


def assert_shares(found: Tensor, expected: Tensor) -> None:
    """Chi-square, with tokens of which few are expected taken together."""
    assert bool((expected[found] > 0).all()), "a token was drawn that is excluded"
    counts = found.bincount(minlength=len(expected)).double()
    rare = expected * len(found) < 8
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]) * len(found)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    degrees = max(1, len(wanted) - 1)
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 6
