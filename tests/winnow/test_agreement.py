"""How far two distributions, and two answers, are the same."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.agreement import count_agreeing, kl_lower_bound, same_likeliest
from winnow.sampling import Sampled, SamplingState, sample_batch
from winnow.sampling_params import SamplingParams
from winnow.tokens import PromptLogprobs, TokenLogprobs

EOS = frozenset({0})
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def top(logits: torch.Tensor, num: int = 20) -> TokenLogprobs:
    params = SamplingParams(temperature=0, num_logprobs=num)
    (sampled,) = sample_batch(logits[None], [SamplingState(params, 0, 1)]).read()
    assert isinstance(sampled, Sampled)
    assert sampled.logprobs is not None
    return sampled.logprobs


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = (one.double().log_softmax(-1) for one in (p, q))
    return float((p.exp() * (p - q)).sum())


def random_logits(seed: int, size: int, spread: float) -> torch.Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([21, 40, 320, 5000]),
    spreads=st.tuples(st.floats(0, 20), st.floats(0, 20)),
    likeness=st.floats(0, 1),
)
def test_the_divergence_is_never_overstated(
    seed: int, size: int, spreads: tuple[float, float], likeness: float
) -> None:
    p = random_logits(seed, size, spreads[0])
    q = likeness * p + (1 - likeness) * random_logits(seed + 1, size, spreads[1])
    assert 0 <= kl_lower_bound(top(p), top(q)) <= kl(p, q) + 1e-4


@given(seed=st.integers(0, 10_000), spread=st.floats(0, 20))
def test_it_is_exact_where_the_lists_hold_the_whole_vocabulary(seed: int, spread: float) -> None:
    p, q = (random_logits(seed + i, 20, spread) for i in range(2))
    assert kl_lower_bound(top(p), top(q)) == pytest.approx(kl(p, q), rel=1e-4, abs=1e-4)


def test_equal_distributions_do_not_diverge() -> None:
    logits = random_logits(1, 320, 3.0)
    assert kl_lower_bound(top(logits), top(logits)) == pytest.approx(0, abs=1e-5)


def test_lists_without_a_common_token_are_far_apart() -> None:
    p, q = torch.zeros(320), torch.zeros(320)
    p[:20], q[20:40] = 10, 10
    bound = kl_lower_bound(top(p), top(q))
    assert 5 < bound <= kl(p, q)


def test_the_formula_of_the_docstring() -> None:
    p = TokenLogprobs(0.0, ((1, math.log(0.5)), (2, math.log(0.3))))
    q = TokenLogprobs(0.0, ((1, math.log(0.6)), (3, math.log(0.1))))
    only = min(0.1, 0.4 * 0.3 / (0.3 + 0.2))  # of token 2 in q, which lists nothing below 0.1
    expected = (
        0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / only) + 0.2 * math.log(0.2 / (0.4 - only))
    )
    assert kl_lower_bound(p, q) == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_tokens_are_compared() -> None:
    p, q = random_logits(1, 50, 2.0), random_logits(2, 50, 2.0)
    assert same_likeliest(top(p), top(p + 0.001 * q))
    assert not same_likeliest(top(p), top(-p))


def told(*top_ids: list[int]) -> PromptLogprobs:
    return PromptLogprobs([0.0] * len(top_ids), list(top_ids), [[-1.0, -2.0]] * len(top_ids))


def test_tokens_agree_where_they_are_the_likeliest() -> None:
    expected = told([5, 6], [7, 8], [9, 1])
    assert count_agreeing([5, 7, 9], expected, GREEDY, EOS) == 3
    assert count_agreeing([5, 8, 9], expected, GREEDY, EOS) == 2


def test_no_end_token_is_expected_before_min_tokens() -> None:
    expected = told([0, 6], [3, 7], [0, 9])
    patient = SamplingParams(
        temperature=0, max_tokens=8, min_tokens=2, stop_token_ids=frozenset({3})
    )
    assert count_agreeing([6, 7, 0], expected, patient, EOS) == 3
    assert count_agreeing([6, 7, 0], expected, GREEDY, EOS) == 1


@pytest.mark.parametrize(
    ("changes", "takes_likeliest"),
    [
        ({}, True),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.1, "min_tokens": 2}, True),
        ({"temperature": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
    ],
)
def test_answers_that_are_greedy_in_the_raw_logits(
    changes: dict[str, object], takes_likeliest: bool
) -> None:
    sampling = SamplingParams(**({"temperature": 0} | changes))  # type: ignore[arg-type]
    assert sampling.takes_likeliest is takes_likeliest
