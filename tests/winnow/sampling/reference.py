"""The distribution of the next token, as documented, row by row in float64; draws to compare."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.errors import NotFinite
from winnow.sampling import Sampled, SamplingState, sample_batch
from winnow.sampling_params import SamplingParams

EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "logit_bias": {3: 1.5, 700: -2.0},
}


def probabilities(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    end_token_ids: Collection[int] = (),
) -> Tensor:
    """The exact probability of each token: [V] float64.  logits: [V]; temperature above 0."""
    logits = logits.double()
    for token in {*prompt, *generated}:
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(generated):
        logits[token] -= params.presence_penalty
        logits[token] -= params.frequency_penalty * list(generated).count(token)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(generated) < params.min_tokens:
        logits[[*end_token_ids, *params.stop_token_ids]] = -torch.inf
    shares = ((logits - logits.max()) / params.temperature).softmax(-1)
    shares = shares.where(shares >= params.min_p * shares.max(), 0)
    ordered, order = shares.sort(descending=True, stable=True)
    if params.top_k:
        ordered[params.top_k :] = 0
    if params.top_p < 1:
        before = ordered.cumsum(-1) - ordered
        ordered[before >= params.top_p * ordered.sum()] = 0
    shares = torch.zeros_like(shares).scatter(0, order, ordered)
    return shares / shares.sum()


def state(
    params: SamplingParams,
    position: int = 0,
    *,
    seed: int = 11,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
) -> SamplingState:
    """A sequence whose next token is at `position`."""
    made = SamplingState(params, seed, position - len(generated), prompt)
    made.extend(generated)
    return made


def mixed_states() -> list[SamplingState]:
    """Rows of every kind, some with log-probabilities."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "num_logprobs": 5} | EVERYTHING,
        {},
        {"temperature": 0.7, "num_logprobs": 2},
        {"min_p": 0.05},
        {"top_k": 7, "top_p": 0.8},
        {"top_k": 40, "min_p": 0.01, "temperature": 1.4, "num_logprobs": 0} | EVERYTHING,
        {"top_p": 0.9},
        {"top_p": 0.5, "top_k": 2000, "temperature": 2.0},
        {"min_tokens": 9, "stop_token_ids": frozenset({1, 5}), "top_p": 0.99},
    ]
    return [
        state(SamplingParams(**changes), 30 + 3 * idx, seed=idx, prompt=(4, 9), generated=(9, 3, 3))
        for idx, changes in enumerate(kinds)
    ]


def outcomes(
    logits: Tensor, states: Sequence[SamplingState], eos_token_ids: Collection[int] = ()
) -> list[Sampled | NotFinite]:
    return sample_batch(logits, states, eos_token_ids).read()


def tokens(
    logits: Tensor, states: Sequence[SamplingState], eos_token_ids: Collection[int] = ()
) -> list[int]:
    """The sampled tokens of rows whose logits are finite."""
    found = outcomes(logits, states, eos_token_ids)
    assert all(isinstance(one, Sampled) for one in found)
    return [one.token_id for one in found if isinstance(one, Sampled)]
