from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.winnow.sampling.reference import EVERYTHING, mixed_states, outcomes, state, tokens
from winnow.errors import NotFinite
from winnow.sampler_version import SAMPLER_VERSION
from winnow.sampling import Sampled, noise
from winnow.sampling_params import SamplingParams
from winnow.tokens import TokenLogprobs

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]).log_softmax(-1)
GREEDY = SamplingParams(temperature=0)


def drawn(params: SamplingParams, logits: Tensor, count: int = 200) -> set[int]:
    """Every token that is drawn at `count` positions."""
    return set(tokens(logits.expand(count, -1), [state(params, at) for at in range(count)]))


@pytest.mark.parametrize("vocab_size", [20, 256, 3000, 40_000])
def test_a_row_does_not_depend_on_its_batch(vocab_size: int) -> None:
    states = [one for one in mixed_states() if 700 not in one.bias_ids or vocab_size > 700]
    logits = torch.randn(len(states), vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    together = outcomes(logits, states, {0, 2})
    backwards = outcomes(logits.flip(0), states[::-1], {0, 2})
    alone = [outcomes(row[None], [one], {0, 2})[0] for row, one in zip(logits, states, strict=True)]
    assert together == backwards[::-1] == alone


def test_the_tokens_of_a_seed_are_those_of_this_version() -> None:
    """If these change, so does SAMPLER_VERSION."""
    logits = (torch.arange(1000) * 37 % 101).float() / 20
    kinds: list[dict[str, Any]]
    kinds = [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.3}]
    states = [
        state(SamplingParams(temperature=0.8, **changes), position, seed=seed)
        for changes in kinds
        for seed, position in ((0, 0), (7, 1000), (2**63 - 1, 2**31))
    ]
    assert SAMPLER_VERSION == 2
    assert tokens(logits.expand(len(states), -1), states) == PINNED


PINNED = [188, 167, 305, 161, 232, 434, 79, 169, 434, 188, 169, 434]


def test_seeds_go_on_beyond_the_largest() -> None:
    """Sequence i has seed + i."""
    logits = LOGITS.expand(3, -1)
    for at in range(20):
        states = [state(SamplingParams(), at, seed=seed) for seed in (2**63, -(2**63), 2**63 + 1)]
        first, same, _ = tokens(logits, states)
        assert first == same


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.stack([LOGITS, torch.tensor([1.0, 4.0, 4.0, 0.0, 4.0])])
    assert tokens(logits, [state(GREEDY)] * 2) == [3, 1]


def test_greedy_rows_need_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.sampling.draw.exponential", None)
    monkeypatch.setattr("winnow.sampling.draw.noise_keys", None)
    greedy = SamplingParams(temperature=0, num_logprobs=3, **EVERYTHING)
    assert len(tokens(torch.zeros(2, 900), [state(greedy, generated=[1])] * 2)) == 2
    assert noise.exponential is not None


def test_penalties_and_biases_change_the_logits_as_documented() -> None:
    logits = torch.tensor([2.0, 2.0, -1.0, 0.0])

    def chosen(**changes: Any) -> int:
        params = SamplingParams(temperature=0, **changes)
        return tokens(logits[None], [state(params, prompt=(2,), generated=(0, 0))])[0]

    assert chosen() == 0
    assert chosen(presence_penalty=0.1) == 1
    assert chosen(frequency_penalty=0.1) == 1
    assert chosen(presence_penalty=-0.1, logit_bias={1: 0.05}) == 0
    assert chosen(repetition_penalty=1.1) == 1
    assert chosen(logit_bias={2: 3.5}) == 2
    assert chosen(logit_bias={2: 3.5}, repetition_penalty=2.0) == 1  # -2 + 3.5 is below 2
    assert chosen(logit_bias={0: -100, 1: -100}) == 3
    assert logits.tolist() == [2.0, 2.0, -1.0, 0.0], "the caller's logits stay as they are"


def test_no_end_token_is_sampled_before_min_tokens() -> None:
    params = SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=1.5,
        logit_bias={3: 100},
        stop_token_ids=frozenset({4}),
    )

    def possible(num_generated: int) -> set[int]:
        states = [state(params, at, generated=[0] * num_generated) for at in range(200)]
        return set(tokens(LOGITS.expand(200, -1), states, {3}))

    assert [possible(number) for number in range(3)] == [{0, 1, 2}, {0, 1, 2}, {3}]
    greedy = SamplingParams(max_tokens=9, min_tokens=2, temperature=0)
    assert tokens(LOGITS[None], [state(greedy)], {3}) == [2]
    everything = range(len(LOGITS))
    assert tokens(LOGITS[None], [state(params)], everything)[0] in everything


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 299, 300])
def test_rows_that_are_not_finite_are_errors_of_their_own(broken: float, at: int) -> None:
    states = mixed_states()
    logits = torch.randn(2 * len(states), 301, generator=torch.Generator().manual_seed(2))
    logits[::2, at] = broken
    states = [one for one in states for _ in range(2)]
    for one in states:
        one.bias_ids = one.bias_ids[:1]
        one.bias = one.bias[:1]
    found = outcomes(logits, states)
    errors, right = found[::2], found[1::2]
    for one, error in zip(states[::2], errors, strict=True):
        assert isinstance(error, NotFinite)
        assert str(error) == f"the model's logits at position {one.position} are not finite"
    assert right == outcomes(logits[1::2], states[1::2])
    assert all(isinstance(one, Sampled) for one in right)


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}])
def test_the_lowest_temperatures_take_the_likeliest(
    temperature: float, filters: dict[str, Any]
) -> None:
    logits = torch.tensor([-30.0, 25.0, 24.9, -1e30, 0.0])
    assert drawn(SamplingParams(temperature=temperature, **filters), logits) == {1}


@pytest.mark.parametrize("penalty", [1e-10, 1e-38, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_lowest_repetition_penalties_take_a_token_that_was_seen(
    penalty: float, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
    logits = torch.tensor([-30.0, 25.0, 1e30, 28.0])
    states = [state(params, at, generated=[0, 1, 2]) for at in range(20)]
    assert set(tokens(logits.expand(20, -1), states)) <= {1, 2}


@pytest.mark.parametrize("vocab_size", [3, 5000])
def test_logprobs_are_of_the_raw_logits(vocab_size: int) -> None:
    logits = torch.full((1, vocab_size), -40.0)
    logits[0, :3] = torch.tensor([1.0, 3.0, 2.0])
    total = log(exp(1) + exp(3) + exp(2))

    def found(num_logprobs: int) -> TokenLogprobs:
        params = SamplingParams(temperature=0, logit_bias={2: 9}, num_logprobs=num_logprobs)
        (one,) = outcomes(logits, [state(params)])
        assert isinstance(one, Sampled)
        assert one.logprobs is not None
        assert one.token_id == 2
        return one.logprobs

    result = found(2)
    assert result.logprob == pytest.approx(2 - total)
    assert [token for token, _ in result.top] == [1, 2]
    assert [value for _, value in result.top] == pytest.approx([3 - total, 2 - total])
    assert found(0).top == ()
    assert len(found(20).top) == min(20, vocab_size)


@pytest.mark.parametrize("size", [5, 3000])
def test_logprobs_of_large_logits_are_those_of_small_ones(size: int) -> None:
    row = torch.arange(size) / 8
    small, large = outcomes(
        torch.stack([row, row + 2**20]), [state(SamplingParams(temperature=0, num_logprobs=3))] * 2
    )
    assert small == large


def test_top_logprobs_are_those_of_a_sort() -> None:
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(3)) * 4
    params = SamplingParams(temperature=0, num_logprobs=20)
    expected = logits.double().log_softmax(-1).topk(20, -1)
    for row, one in enumerate(outcomes(logits, [state(params)] * 3)):
        assert isinstance(one, Sampled)
        assert one.logprobs is not None
        ids, values = zip(*one.logprobs.top, strict=True)
        assert list(ids) == expected.indices[row].tolist()
        assert list(values) == pytest.approx(expected.values[row].tolist(), abs=1e-5)
        assert one.logprobs.logprob == values[0]
