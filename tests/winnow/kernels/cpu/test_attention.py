"""Attention within a prompt and over pages, against PyTorch and the references."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.pages import Pages, filled_pages
from winnow.kernels import attention
from winnow.kernels.cpu import attention as on_cpu
from winnow.kernels.variant import PLAIN, Variant

TOLERANCE = 0.016  # of values up to 4: one place of bfloat16's


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Tensor,
    scaling: float,
    *,
    first_keys: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """In float64.  Arguments as of `attend`."""
    group = len(query) // len(key)
    keys, values = (part.double().repeat_interleave(group, 0) for part in (key, value))
    every = torch.arange(key.shape[1])
    is_seen = every <= own_keys[:, None]
    if first_keys is not None:
        is_seen &= every >= first_keys[:, None]
    logits = query.double() @ keys.mT * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~is_seen, -torch.inf)
    if sinks is None:
        return logits.softmax(-1) @ values
    column = sinks.double()[:, None, None].expand(-1, len(own_keys), 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ values


def projection(num_tokens: int, heads: list[int], head_dim: int) -> list[Tensor]:
    """Queries, keys and values [heads, T, D] as views into one product."""
    product = torch.randn(num_tokens, sum(heads), head_dim).bfloat16()
    return [part.transpose(0, 1) for part in torch.split(product, heads, dim=1)]


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 65, 513, 1100])
@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 32), (2, 256), (3, 96), (7, 64), (8, 128), (16, 32)]
)
def test_every_token_attends_to_those_before_it(num_tokens: int, group: int, head_dim: int) -> None:
    query, key, value = projection(num_tokens, [2 * group, 2, 2], head_dim)
    positions = torch.arange(num_tokens)
    found = on_cpu.attend(query, key, value, positions, head_dim**-0.5)
    expected = naive(query, key, value, positions, head_dim**-0.5)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_some_tokens_get_what_they_get_beside_all_others() -> None:
    query, key, value = projection(1300, [6, 2, 2], 64)
    every = on_cpu.attend(query, key, value, torch.arange(1300), 0.125)
    for chosen in (torch.tensor([0, 3, 511, 512, 700, 1299]), torch.arange(900, 1300)):
        own = on_cpu.attend(query[:, chosen], key, value, chosen, 0.125)
        assert torch.equal(own, every[:, chosen])


@pytest.mark.parametrize("window", [1, 16, 100, 600])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 32), (7, 64), (16, 96)])
def test_every_token_attends_to_the_keys_of_its_window(
    window: int, group: int, head_dim: int
) -> None:
    query, key, value = projection(1300, [2 * group, 2, 2], head_dim)
    every = torch.arange(1300)
    firsts = (every + 1 - window).clamp_min(0)
    found = on_cpu.attend(query, key, value, every, head_dim**-0.5, first_keys=firsts)
    expected = naive(query, key, value, every, head_dim**-0.5, first_keys=firsts)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    for chosen in (torch.tensor([0, 3, 511, 512, 700, 1299]), torch.arange(900, 1300)):
        own = on_cpu.attend(
            query[:, chosen], key, value, chosen, head_dim**-0.5, first_keys=firsts[chosen]
        )
        assert torch.equal(own, found[:, chosen]), "whatever others are computed"


@pytest.mark.parametrize("softcap", [None, 5.0, 50.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_logits_are_capped_and_sinks_take_part(softcap: float | None, sinks: bool) -> None:
    query, key, value = projection(600, [6, 2, 2], 64)
    every = torch.arange(600)
    how: dict[str, Any] = {
        "first_keys": every - every % 100,
        "softcap": softcap,
        "sinks": torch.linspace(-3, 20, 6) if sinks else None,
    }
    found = on_cpu.attend(query, key, value, every, 0.3, **how)
    expected = naive(query, key, value, every, 0.3, **how)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_keys_that_a_token_does_not_see_may_be_any_numbers() -> None:
    query, key, value = projection(70, [2, 1, 1], 32)
    seen = on_cpu.attend(query[:, :40], key, value, torch.arange(40), 1.0)
    key[:, 48:], value[:, 48:] = torch.nan, torch.inf
    assert torch.equal(on_cpu.attend(query[:, :40], key, value, torch.arange(40), 1.0), seen)


def test_logits_of_any_size_give_numbers() -> None:
    query, key, value = projection(600, [1, 1, 1], 32)
    found = on_cpu.attend(query * 1e4, key * 1e4, value, torch.arange(600), 1.0)
    assert found.isfinite().all()


def step_of(pages: Pages, group: int) -> tuple[Tensor, ...]:
    num_rows, num_kv_heads = pages.lengths.shape
    heads = [num_kv_heads * group, num_kv_heads, num_kv_heads]
    product = torch.randn(num_rows, sum(heads), pages.keys.shape[-1]).bfloat16()
    return torch.split(product, heads, dim=1)


def attend(
    kernel: object, pages: Pages, step: tuple[Tensor, ...], variant: Variant = PLAIN
) -> Tensor:
    assert callable(kernel)
    return kernel(*step, *pages.arguments(pages.keys.shape[-1] ** -0.5, variant))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (7, 32), (4, 128), (16, 96), (2, 256)])
def test_a_step_over_pages_equals_the_reference(
    group: int, head_dim: int, page_size: int, is_int8: bool
) -> None:
    lengths = [[1, 2], [15, 16], [17, 33], [0, 0], [64, 65], [1100, 511], [512, 513]]
    pages = filled_pages(lengths, head_dim=head_dim, page_size=page_size, dtype=torch.bfloat16)
    pages = pages.quantized() if is_int8 else pages
    step, other = step_of(pages, group), pages.copy()
    found = attend(on_cpu.append_and_attend, pages, step)
    expected = attend(attention.append_and_attend, other, step)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    for own, reference in zip(pages.parts, other.parts, strict=True):
        assert torch.equal(own.nan_to_num(7), reference.nan_to_num(7))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("window", [1, 20, 600])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_window_softcap_and_sinks_are_as_in_the_reference(
    window: int, softcap: float | None, has_sinks: bool, is_int8: bool
) -> None:
    lengths = [[1, 2], [15, 16], [17, 33], [0, 0], [64, 65], [1100, 511]]
    pages = filled_pages(lengths, head_dim=64, page_size=16, dtype=torch.bfloat16)
    pages = pages.quantized() if is_int8 else pages
    sinks = torch.randn(14).bfloat16() if has_sinks else None
    variant = replace(pages.seen(window), softcap=softcap, sinks=sinks)
    step, other = step_of(pages, 7), pages.copy()
    found = attend(on_cpu.append_and_attend, pages, step, variant)
    expected = attend(attention.append_and_attend, other, step, variant)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_entries_before_the_first_that_a_row_sees_are_not_read() -> None:
    pages = filled_pages([[70, 40]], head_dim=32, page_size=16, dtype=torch.bfloat16)
    step, variant, other = step_of(pages, 2), pages.seen(20), pages.copy()
    expected = attend(on_cpu.append_and_attend, pages, step, variant)
    assert variant.first is not None
    is_hidden = pages.positions < variant.first[0]
    for part in (other.keys, other.values):
        # Those of the first 16 that are read are hidden by their weight: they are numbers.
        part[is_hidden] = 9.0
    assert torch.equal(attend(on_cpu.append_and_attend, other, step, variant), expected)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 3.0, 1e5, 1e7, 1e9])
def test_a_new_entry_gets_the_bits_that_the_reference_quantizes_it_to(size: float) -> None:
    pages = filled_pages([[5, 40]] * 4, head_dim=96, page_size=16, dtype=torch.bfloat16).quantized()
    other, (query, keys, values) = pages.copy(), step_of(pages, 2)
    step = (query, keys * size, -values * size)
    attend(on_cpu.append_and_attend, pages, step)
    attend(attention.append_and_attend, other, step)
    for own, reference in zip(pages.parts, other.parts, strict=True):
        assert torch.equal(own.nan_to_num(7), reference.nan_to_num(7))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e7])
@pytest.mark.parametrize("part", [1, 2])
def test_a_new_entry_that_int8_cannot_hold_makes_the_output_nan(number: float, part: int) -> None:
    pages = filled_pages([[70, 9]], head_dim=32, page_size=16, dtype=torch.bfloat16).quantized()
    step = step_of(pages, 2)
    step[part][:, :, 7] = number
    assert attend(on_cpu.append_and_attend, pages, step).isnan().all()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("variant", [PLAIN, Variant(softcap=5.0), Variant(sinks=torch.zeros(4))])
@pytest.mark.parametrize("part", [0, 1])
def test_attention_to_nothing_but_nan_is_nan(part: int, variant: Variant, is_int8: bool) -> None:
    pages = filled_pages([[1, 1]], head_dim=32, page_size=16, dtype=torch.bfloat16)
    pages = pages.quantized() if is_int8 else pages
    step = step_of(pages, 2)
    step[part][:, :, 7] = torch.nan
    assert attend(on_cpu.append_and_attend, pages, step, variant).isnan().all()


def test_a_query_of_nan_gets_nan_within_a_prompt() -> None:
    query, key, value = projection(600, [2, 1, 1], 32)
    clean = on_cpu.attend(query, key, value, torch.arange(600), 1.0)
    query[:, 3] = torch.nan
    found = on_cpu.attend(query, key, value, torch.arange(600), 1.0)
    assert found[:, 3].isnan().all()
    assert torch.equal(found[:, 4:], clean[:, 4:])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("change", [Tensor.float, lambda one: one.mT.contiguous().mT])
def test_a_step_takes_bfloat16_of_whole_rows_alone(part: int, change: Any) -> None:
    pages = filled_pages([[5, 5]], head_dim=32, page_size=16, dtype=torch.bfloat16)
    step = list(step_of(pages, 2))
    step[part] = change(step[part])
    with pytest.raises(AssertionError, match="float"):
        attend(on_cpu.append_and_attend, pages, tuple(step))


def test_a_row_gets_the_same_bits_whatever_shares_its_batch() -> None:
    pages = filled_pages([[700, 20], [3, 900]], head_dim=64, page_size=16, dtype=torch.bfloat16)
    step = step_of(pages, 3)
    together = attend(on_cpu.append_and_attend, pages, step)
    for idx in range(2):
        own = tuple(part[idx : idx + 1] for part in step)
        assert torch.equal(attend(on_cpu.append_and_attend, pages.row(idx), own)[0], together[idx])


def test_a_step_gives_the_bits_that_a_prompt_with_its_token_gives() -> None:
    query, key, value = projection(600, [6, 2, 2], 64)
    whole = on_cpu.attend(query, key, value, torch.arange(600), 0.125)
    pages = torch.arange(2 * 38).view(1, 2, 38)  # 38 pages of 16 for each head
    keys, values = (torch.zeros(2, 608, 64, dtype=torch.bfloat16) for _ in range(2))
    keys[:, :599], values[:, :599] = key[:, :599], value[:, :599]
    found = on_cpu.append_and_attend(
        query[None, :, 599],
        key[None, :, 599],
        value[None, :, 599],
        keys.view(-1, 16, 64),
        values.view(-1, 16, 64),
        torch.tensor([[599, 608 + 599]]),
        pages,
        torch.tensor([0]),
        torch.tensor([[600, 600]], dtype=torch.int32),
        600,
        0.125,
    )
    assert torch.equal(found[0], whole[:, 599])
