import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from winnow.attention import (
    AttentionOptions,
    PrefillAttention,
    ScatteredAttention,
    causal_attention,
    masked,
)
from winnow.layers import FULL, Layer

HOW = AttentionOptions(0.3)


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: list[int],
    options: AttentionOptions,
    positions: list[int] | None = None,
) -> Tensor:
    """Row by row in float64, each over the keys up to its own whose positions it sees."""
    positions = positions or list(range(key.shape[2]))
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for head in range(query.shape[1]):
        keys, values = key[0, head // group].double(), value[0, head // group].double()
        for row, at in enumerate(own):
            first = options.layer.first_visible(positions[at])
            seen = [idx for idx in range(at + 1) if positions[idx] >= first]
            logits = keys[seen] @ query[0, head, row].double() * options.scaling
            if options.softcap is not None:
                logits = options.softcap * (logits / options.softcap).tanh()
            weights = logits.exp()
            rest = 0.0 if options.sinks is None else options.sinks[head].double().exp()
            output[0, head, row] = weights @ values[seen] / (weights.sum() + rest)
    return output


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
        patch.setattr(masked, "_MASKED_QUERIES", 5)
        found = causal_attention(query, key, value, HOW)
    positions = list(range(num_keys - num_queries, num_keys))
    torch.testing.assert_close(
        found, naive(query, key, value, positions, HOW), rtol=1e-5, atol=1e-5
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
        patch.setattr(masked, "_MASKED_QUERIES", 5)
        found = attention(0, query, unused, unused, HOW)
    torch.testing.assert_close(
        found, naive(query, key, value, positions, HOW), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_cached", [0, 3, 20])
def test_keeps_the_keys_and_values_of_all_tokens(num_cached: int) -> None:
    query, key, value = make(24, 24, 2)
    cached = torch.full((2, 2, 24, 8), torch.nan)
    cached[:, :, :num_cached] = torch.cat([key, value])[:, :, :num_cached]
    own = slice(num_cached, None)
    attention = PrefillAttention(4, cached if num_cached else None)
    found = attention(0, query[:, :, own], key[:, :, own], value[:, :, own], HOW)
    assert torch.equal(attention.keys, key[0])
    assert torch.equal(attention.values, value[0])
    assert torch.equal(attention.queries, query[0, :, -4:])
    expected = PrefillAttention(4)(0, query, key, value, HOW)[:, :, own]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


LAYERS = [FULL, Layer("sliding", 1), Layer("sliding", 7), Layer("chunked", 5), Layer("chunked", 8)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@given(positions=st.sets(st.integers(0, 60), min_size=1).map(sorted), data=st.data())
@settings(max_examples=30)
def test_tokens_with_gaps_see_what_their_positions_allow(
    layer: Layer, softcap: float | None, has_sinks: bool, positions: list[int], data: st.DataObject
) -> None:
    num_keys, num_groups = len(positions), 3
    num_queries = data.draw(st.integers(1, num_keys))
    query, key, value = make(num_queries, num_keys, num_groups)
    sinks = torch.linspace(-2, 3, 2 * num_groups) if has_sinks else None
    options = AttentionOptions(0.3, layer, softcap, sinks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "_MASKED_QUERIES", 5)
        patch.setattr(masked, "_MAX_LOGITS_ON_CPU", 400)
        found = causal_attention(query, key, value, options, torch.tensor(positions))
        from_first = causal_attention(query, key, value, options)
    own = list(range(num_keys - num_queries, num_keys))
    expected = naive(query, key, value, own, options, positions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected = naive(query, key, value, own, options)
    torch.testing.assert_close(from_first, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS[1:], ids=str)
@given(positions=st.sets(st.integers(0, 29), min_size=1).map(sorted))
@settings(max_examples=30)
def test_scattered_tokens_see_what_their_windows_hold(layer: Layer, positions: list[int]) -> None:
    query, key, value = make(len(positions), 30, 2)
    attention = ScatteredAttention(torch.cat([key, value]), torch.tensor(positions))
    options = AttentionOptions(0.3, layer, 4.0)
    found = attention(0, query, key[:, :, :0], value[:, :, :0], options)
    expected = naive(query, key, value, positions, options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_sees_what_positions_allow() -> None:
    """Where there is no kernel, PyTorch's operations stand in for it."""
    torch.manual_seed(0)
    positions = torch.randperm(2000)[:700].sort().values
    key, value = torch.randn(2, 1, 2, 700, 32).bfloat16()
    query = torch.randn(1, 4, 300, 32).bfloat16()
    for layer in (Layer("sliding", 600), Layer("chunked", 512)):
        options = AttentionOptions(0.3, layer, 5.0, torch.linspace(-2, 3, 4).bfloat16())
        found = causal_attention(query, key, value, options, positions)
        expected = naive(
            query.float(),
            key.float(),
            value.float(),
            list(range(400, 700)),
            options,
            positions.tolist(),
        )
        torch.testing.assert_close(found.float(), expected, rtol=0.016, atol=0.016)
