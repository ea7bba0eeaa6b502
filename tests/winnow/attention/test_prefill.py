import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from winnow.attention import PrefillAttention, ScatteredAttention, causal_attention
from winnow.attention import prefill as prefill_attention


def naive(
    query: Tensor, key: Tensor, value: Tensor, positions: list[int], scaling: float
) -> Tensor:
    """Row by row in float64, each over the keys up to its position."""
    num_groups = query.shape[1] // key.shape[1]
    keys = key.double().repeat_interleave(num_groups, 1)
    values = value.double().repeat_interleave(num_groups, 1)
    rows = []
    for row, position in enumerate(positions):
        one = query[:, :, row : row + 1].double()
        weights = (one @ keys[:, :, : position + 1].mT * scaling).softmax(-1)
        rows.append(weights @ values[:, :, : position + 1])
    return torch.cat(rows, dim=2).float()


def make(num_queries: int, num_keys: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_queries * 100 + num_keys)
    key, value = torch.randn(2, 1, 2, num_keys, 8)
    return torch.randn(1, 2 * num_groups, num_queries, 8), key, value


@pytest.mark.parametrize("num_groups", [1, 3])
@given(num_keys=st.integers(1, 40), data=st.data())
@settings(max_examples=60)
def test_the_last_tokens_attend_to_all_before_them(
    num_groups: int, num_keys: int, data: st.DataObject
) -> None:
    num_queries = data.draw(st.integers(1, num_keys))
    query, key, value = make(num_queries, num_keys, num_groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_attention, "_MASKED_QUERIES", 5)
        found = causal_attention(query, key, value, 0.3)
    positions = list(range(num_keys - num_queries, num_keys))
    torch.testing.assert_close(
        found, naive(query, key, value, positions, 0.3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_groups", [1, 3])
@given(positions=st.sets(st.integers(0, 29), min_size=1).map(sorted))
@settings(max_examples=60)
def test_scattered_tokens_attend_to_all_before_each(num_groups: int, positions: list[int]) -> None:
    query, key, value = make(len(positions), 30, num_groups)
    cached = torch.cat([key, value])
    attention = ScatteredAttention(cached, torch.tensor(positions))
    unused = torch.full((1, 2, len(positions), 8), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_attention, "_MASKED_QUERIES", 5)
        found = attention(0, query, unused, unused, 0.3)
    torch.testing.assert_close(
        found, naive(query, key, value, positions, 0.3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_cached", [0, 3, 20])
def test_keeps_the_keys_and_values_of_all_tokens(num_cached: int) -> None:
    query, key, value = make(24, 24, 2)
    cached = torch.full((2, 2, 24, 8), torch.nan)
    cached[:, :, :num_cached] = torch.cat([key, value])[:, :, :num_cached]
    own = slice(num_cached, None)
    attention = PrefillAttention(4, cached if num_cached else None)
    found = attention(0, query[:, :, own], key[:, :, own], value[:, :, own], 0.3)
    assert torch.equal(attention.keys, key[0])
    assert torch.equal(attention.values, value[0])
    assert torch.equal(attention.queries, query[0, :, -4:])
    expected = PrefillAttention(4)(0, query, key, value, 0.3)[:, :, own]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
