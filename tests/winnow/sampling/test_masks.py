"""Masks leave a row the tokens that are allowed, and other rows as they were."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.winnow.no_waiting import META, no_waiting
from tests.winnow.sampling.reference import mixed_states, outcomes, probabilities, state
from winnow.sampling import Sampled, sample_batch
from winnow.sampling.masks import TokenMasks, unpacked
from winnow.sampling_params import SamplingParams

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.1, "min_p": 0.1},
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 1500, "top_p": 0.9, "min_p": 0.01},
    {"presence_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {5: 20.0}},
]


def bits_of(allowed: Collection[int], vocab_size: int) -> NDArray[np.int32]:
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(allowed)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def masks(rows: Sequence[int], allowed: Sequence[Collection[int]], vocab_size: int) -> TokenMasks:
    return TokenMasks(list(rows), np.stack([bits_of(one, vocab_size) for one in allowed]))


@pytest.mark.parametrize("vocab_size", [40, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_allowed", [1, 2, -1])
def test_only_allowed_tokens_are_drawn_and_all_that_filters_keep_of_them(
    vocab_size: int, kind: dict[str, Any], num_allowed: int
) -> None:
    """-1: all but one, which is the likeliest."""
    torch.manual_seed(0)
    logits = torch.randn(vocab_size) * 2
    likeliest = int(logits.argmax())
    others = [one for one in range(vocab_size) if one != likeliest]
    allowed = set(others if num_allowed < 0 else others[-num_allowed:])
    params = SamplingParams(**kind)
    states = [
        state(params, at, prompt=(4, 9), generated=(9, 3) if params.penalizes else ())
        for at in range(10, 110)
    ]
    rows = logits.expand(len(states), -1).contiguous()
    own = masks(range(len(states)), [allowed] * len(states), vocab_size)
    drawn = [one.token_id for one in sample_batch(rows, states, (), own).read()]  # type: ignore[union-attr]
    assert set(drawn) <= allowed
    if params.temperature and num_allowed > 0:
        barred = logits.clone()
        barred[[one for one in range(vocab_size) if one not in allowed]] = -1e9
        prompt, generated = ((4, 9), (9, 3)) if params.penalizes else ((), ())
        shares = probabilities(barred, params, prompt, generated)
        assert set(drawn) <= set(shares.nonzero()[:, 0].tolist())
        assert {idx for idx, share in enumerate(shares.tolist()) if share > 0.1} <= set(drawn)


def test_rows_without_a_mask_draw_what_they_draw_alone() -> None:
    states = mixed_states()
    logits = torch.randn(len(states), 3000, generator=torch.Generator().manual_seed(1)) * 3
    free = outcomes(logits, states, {0, 2})
    own = masks([7, 2], [{5}, {6, 7}], 3000)
    mixed = sample_batch(logits, states, {0, 2}, own).read()
    assert [one for idx, one in enumerate(mixed) if idx not in (2, 7)] == [
        one for idx, one in enumerate(free) if idx not in (2, 7)
    ]
    for row, allowed in ((7, {5}), (2, {6, 7})):
        one = mixed[row]
        assert isinstance(one, Sampled)
        assert one.token_id in allowed


def test_a_token_that_is_likeliest_without_the_mask_too_is_drawn_alike() -> None:
    """So a seed's token depends on the mask only where that bars tokens."""
    states = [state(SamplingParams(seed=3), at) for at in range(50)]
    logits = torch.randn(50, 500, generator=torch.Generator().manual_seed(1)).contiguous()
    everything = masks(range(50), [range(500)] * 50, 500)
    assert sample_batch(logits, states, (), everything).read() == outcomes(logits, states)


def test_logprobs_are_those_without_the_mask() -> None:
    params = SamplingParams(temperature=0, num_logprobs=2)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).log_softmax(-1)
    (one,) = sample_batch(logits, [state(params)], (), masks([0], [{1}], 4)).read()
    assert isinstance(one, Sampled)
    assert one.logprobs is not None
    assert one.logprobs.logprob == pytest.approx(logits[0, 1].item())
    assert [token for token, _ in one.logprobs.top] == [3, 2]


def test_bits_are_unpacked_alike_on_every_device() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (3, 16), np.uint8)
    expected = np.unpackbits(packed, axis=1, count=123, bitorder="little")
    assert unpacked(torch.from_numpy(packed), 123).tolist() == (expected == 1).tolist()


@pytest.mark.parametrize("rows", [[1, 0], [*range(10)]])
def test_masks_are_applied_without_waiting(rows: list[int]) -> None:
    states = mixed_states()
    logits = torch.empty(len(states), 3000, device=META)
    own = masks(rows, [{1}] * len(rows), 3000)
    with no_waiting():
        assert sample_batch(logits, states, {0}, own).tokens.device == META


def test_masks_of_parts_of_a_batch_are_joined() -> None:
    one, other = masks([2], [{1}], 64), masks([0, 1], [{2}, {3}], 64)
    joined = TokenMasks.joined([one, other])
    assert joined is not None
    assert list(joined.rows) == [2, 0, 1]
    assert joined.bits.tolist() == [[2, 0], [4, 0], [8, 0]]
    assert TokenMasks.joined([one]) is one
    assert TokenMasks.joined([]) is None
