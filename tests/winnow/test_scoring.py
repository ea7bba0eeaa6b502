import pytest
import torch

from tests.winnow import naive
from winnow.attention import AttentionOptions
from winnow.scoring import descending_order, observed_attention, pooled_scores, ranks_from_order


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize(("num_tokens", "window"), [(4, 4), (5, 4), (33, 8)])
def test_observed_attention_equals_the_formula(
    num_heads: int, num_kv_heads: int, num_tokens: int, window: int
) -> None:
    torch.manual_seed(num_tokens)
    queries = torch.randn(num_heads, window, 8)
    keys = torch.randn(num_kv_heads, num_tokens, 8)
    mass = observed_attention(queries, keys, AttentionOptions(8**-0.5))
    expected = torch.tensor(naive.observed_attention(queries, keys))
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.sum(1), torch.full((num_heads,), float(window)))


def test_pooling_counts_zeros_beyond_the_ends() -> None:
    mass = torch.tensor([[3.0, 6.0, 9.0, 30.0, 99.0]])
    assert pooled_scores(mass, window_size=1, kernel_size=3).tolist() == [[3.0, 6.0, 15.0, 13.0]]


def test_ties_go_to_the_earlier_token() -> None:
    order = descending_order(torch.tensor([1.0, 5.0, 1.0, 5.0, 5.0]))
    assert order.tolist() == [1, 3, 4, 0, 2]
    assert ranks_from_order(order).tolist() == [4, 1, 5, 2, 3]
