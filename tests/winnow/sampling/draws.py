"""Draws over many positions, and how their shares compare with probabilities."""

from typing import Any

import torch
from torch import Tensor

from tests.winnow.sampling.reference import state, tokens
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
