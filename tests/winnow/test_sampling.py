from collections import Counter
from dataclasses import replace
from math import exp, log
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from winnow.errors import EngineFailed, InvalidSetting
from winnow.sampling import TokenHistory, sample, token_logprobs, uniform
from winnow.sampling_params import SamplingParams

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]).log_softmax(-1)


def draw(params: SamplingParams, count: int = 4000, logits: Tensor = LOGITS) -> dict[int, float]:
    """Observed share of each token over `count` positions."""
    tokens = [sample(logits, params, p, TokenHistory(), seed=11) for p in range(count)]
    return {token: n / count for token, n in Counter(tokens).items()}


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_uniform_depends_on_seed_and_position_alone(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0 <= value < 1
    assert value == uniform(seed, position)
    assert len({value, uniform(seed + 1, position), uniform(seed, position + 1)}) == 3


def test_uniform_is_uniform() -> None:
    values = torch.tensor([uniform(3, position) for position in range(20000)])
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 50  # chi-square, 19 degrees: p < 0.0002
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.03


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_follow_the_softmax(temperature: float) -> None:
    shares = draw(SamplingParams(temperature=temperature))
    expected = (LOGITS / temperature).softmax(-1)
    for token, share in enumerate(expected.tolist()):
        assert shares.get(token, 0) == pytest.approx(share, abs=0.03)


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    greedy = SamplingParams(temperature=0)
    assert draw(greedy) == {3: 1.0}
    assert draw(greedy, 5, torch.tensor([1.0, 4.0, 4.0])) == {1: 1.0}


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({"top_k": 2}, {2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {3}),  # token 3 has 0.64
        ({"top_p": 0.7}, {2, 3}),
        ({"top_p": 1e-9}, {3}),
        ({"min_p": 0.3}, {2, 3}),  # e^-1 of the best is 0.37, e^-2 is 0.14
        ({"min_p": 1.0}, {3}),
        ({"top_k": 3, "top_p": 0.95, "min_p": 0.1}, {1, 2, 3}),  # of three, 0.91 comes before 1
    ],
)
def test_filters_leave_what_they_should(changes: dict[str, Any], possible: set[int]) -> None:
    assert set(draw(SamplingParams(**changes))) == possible


def test_penalties_and_biases_change_the_logits_as_documented() -> None:
    logits = torch.tensor([2.0, 2.0, -1.0, 0.0])
    history = TokenHistory(prompt=(2,), generated=[0, 0])

    def chosen(**changes: Any) -> int:
        return sample(logits, SamplingParams(temperature=0, **changes), 0, history, seed=0)

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
    params = SamplingParams(max_tokens=9, min_tokens=2, temperature=1.5, logit_bias={3: 100})

    def tokens(num_generated: int) -> set[int]:
        history = TokenHistory(generated=[0] * num_generated)
        return {
            sample(LOGITS, params, at, history, seed=5, end_token_ids={3, 4}) for at in range(200)
        }

    assert [tokens(number) for number in range(3)] == [{0, 1, 2}, {0, 1, 2}, {3}]
    greedy = replace(params, temperature=0)
    assert sample(LOGITS, greedy, 0, TokenHistory(), seed=5, end_token_ids={3}) == 2
    everything = range(len(LOGITS))
    assert sample(LOGITS, params, 0, TokenHistory(), seed=5, end_token_ids=everything) in everything


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(EngineFailed, match="position 5 are not finite"):
        sample(torch.tensor([0.0, float("nan")]), SamplingParams(), 5, TokenHistory(), seed=0)


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([-30.0, 25.0, 24.9, -1e30, 0.0])
    assert draw(SamplingParams(temperature=temperature), 20, logits) == {1: 1.0}


@pytest.mark.parametrize("penalty", [1e-10, 1e-38, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_lowest_repetition_penalties_take_a_token_that_was_seen(
    penalty: float, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
    history = TokenHistory(generated=[0, 1, 2])
    logits = torch.tensor([-30.0, 25.0, 1e30, 28.0])
    tokens = {sample(logits, params, position, history, seed=3) for position in range(20)}
    assert tokens <= {1, 2}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    total = log(exp(1) + exp(3) + exp(2))
    result = token_logprobs(logits, 2, 2)
    assert result.logprob == pytest.approx(2 - total)
    assert [token for token, _ in result.top] == [1, 2]
    assert [value for _, value in result.top] == pytest.approx([3 - total, 2 - total])
    assert token_logprobs(logits, 0, 0).top == ()
    assert len(token_logprobs(logits, 0, 20).top) == 3


def test_settings_out_of_range_name_the_number_and_the_limit() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1}, r"temperature is -1; the allowed range is \[0, 2\]"),
        ({"top_p": 2}, r"top_p is 2; the allowed range is \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_logprobs": 21}, r"logprobs is 21; the allowed range is \[0, 20\]"),
        ({"logit_bias": MappingProxyType({1: 101.0})}, "logit_bias is 101"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens is 5; the allowed range is \[0, 4\]"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        (
            {"stop_token_ids": frozenset(range(129))},
            r"stop_token_ids is 129; the allowed range is",
        ),
    ]
    for values, message in cases:
        with pytest.raises(InvalidSetting, match=message):
            SamplingParams(**values)
