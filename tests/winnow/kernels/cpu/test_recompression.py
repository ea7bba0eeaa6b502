"""Scoring, choice and compaction of many heads at once, against their references."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.winnow.kernels.pages import Pages, filled_pages
from winnow.catalog import RECOMPRESSIONS
from winnow.compression import choice, recompression_rule
from winnow.compression.heads import PagedHeads, RecompressionKernels
from winnow.compression.recompress import best_entries, entries_to_keep
from winnow.compression.rkv import rkv_scores
from winnow.kernels import recompression
from winnow.kernels.cpu import recompression as on_cpu
from winnow.pruning_settings import Recompression

LENGTHS = (9, 16, 17, 65, 100, 300, 700)
WINDOW = 8


def heads_in_pages(lengths: tuple[int, ...], head_dim: int, page_size: int = 16) -> Pages:
    """One row whose heads are of these lengths, NaN behind them."""
    with_next = [[length + 1 for length in lengths]]
    pages = filled_pages(
        with_next, head_dim=head_dim, page_size=page_size, dtype=torch.bfloat16
    ).row(0)
    last = torch.tensor(lengths)
    at = pages.pages[0].gather(1, (last // page_size)[:, None])[:, 0]
    pages.keys[at, last % page_size] = torch.nan
    return pages


def alike(pages: Pages, number: int) -> Pages:
    """Keys of a few directions with noise, so that many are similar, and some of length 0."""
    directions = torch.randn(number, pages.keys.shape[-1])
    chosen = directions[torch.randint(0, number, pages.keys.shape[:2])]
    noisy = chosen + torch.randn(pages.keys.shape) * torch.rand(*pages.keys.shape[:2], 1)
    noisy[torch.rand(pages.keys.shape[:2]) < 0.05] = 0
    pages.keys.copy_(noisy.bfloat16().where(pages.keys.isfinite(), torch.nan))
    return pages


def exact(keys: Tensor) -> Tensor:
    """What the reference takes."""
    return keys if keys.dtype == torch.int8 else keys.float()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 32), (2, 64), (7, 96), (5, 256)])
def test_window_scores_equal_the_reference(
    group: int, head_dim: int, page_size: int, is_int8: bool
) -> None:
    pages = heads_in_pages(LENGTHS, head_dim, page_size)
    pages = pages.quantized() if is_int8 else pages
    queries = torch.randn(len(LENGTHS), group, WINDOW, head_dim).bfloat16()
    at = (pages.pages[0], torch.tensor(LENGTHS), head_dim**-0.5, pages.scales)
    found = on_cpu.window_scores(queries, pages.keys, *at)
    expected = recompression.window_scores(queries.float(), exact(pages.keys), *at)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("directions", [1, 5, 50, 10_000])
@pytest.mark.parametrize(("group", "window", "head_dim"), [(1, 8, 32), (4, 7, 64), (2, 1, 96)])
def test_rkv_scores_equal_the_reference(
    group: int, window: int, head_dim: int, directions: int, weight: float, is_int8: bool
) -> None:
    """Whether all keys, many or none are similar to others."""
    pages = alike(heads_in_pages(LENGTHS, head_dim), directions)
    pages = pages.quantized() if is_int8 else pages
    queries = torch.randn(len(LENGTHS), group, window, head_dim).bfloat16()
    at = (pages.pages[0], torch.tensor(LENGTHS), head_dim**-0.5, pages.scales, 7, weight)
    found = on_cpu.rkv_scores(queries, pages.keys, *at)
    expected = rkv_scores(queries.float(), exact(pages.keys), *at)
    for own, other, length in zip(found, expected, LENGTHS, strict=True):
        before = slice(length - window)
        torch.testing.assert_close(own[before], other[before], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_key_that_is_not_finite_is_similar_to_nothing(is_int8: bool) -> None:
    pages = alike(heads_in_pages((60,), 32), 2)
    pages.keys[pages.pages[0, 0, 1], 3] = torch.inf
    pages.keys[pages.pages[0, 0, 2], 5] = torch.nan
    finite = replace(pages, keys=pages.keys.masked_fill(~pages.keys.isfinite(), 0))
    pages, finite = (one.quantized() if is_int8 else one for one in (pages, finite))
    queries = torch.zeros(1, 1, WINDOW, 32).bfloat16()

    def at(pages: Pages) -> tuple[Any, ...]:
        return pages.pages[0], torch.tensor([60]), 1.0, pages.scales, 1, 0.0

    found = on_cpu.rkv_scores(queries, pages.keys, *at(pages))[0, : 60 - WINDOW]
    expected = rkv_scores(queries.float(), exact(finite.keys), *at(finite))[0, : 60 - WINDOW]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


HEADS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)


@settings(max_examples=100)
@given(HEADS, st.integers(0, 2**32))
def test_the_best_are_those_of_the_reference(heads: list[tuple[int, int]], seed: int) -> None:
    """The earlier of equals, and zeros of either sign are equal."""
    budgets = [3 + more for more, _ in heads]
    lengths = torch.tensor([sum(one) + 3 for one in heads])
    generator = torch.Generator().manual_seed(seed)
    size = (len(heads), int(lengths.max()))
    scores = torch.randint(-3, 4, size, generator=generator) * torch.tensor(-0.5)
    step = (lengths, 3, torch.tensor(budgets), min(budgets), max(budgets))
    found = on_cpu.best_entries(scores.clone(), *step)
    expected = best_entries(scores.clone(), *step)
    for own, other, budget in zip(found, expected, budgets, strict=True):
        assert own[:budget].tolist() == other[:budget].tolist()


def test_scores_that_are_not_numbers_are_the_lowest() -> None:
    scores = torch.tensor([[torch.nan, -1e9, torch.nan, -torch.inf, 0.0]])
    kept = on_cpu.best_entries(scores, torch.tensor([5]), 1, torch.tensor([3]), 3, 3)
    assert kept.tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("head_dim", [32, 96])
def test_compaction_equals_the_reference_bit_for_bit(head_dim: int) -> None:
    pages = heads_in_pages((0, 1, 20, 150, 300), head_dim)
    positions = torch.randperm(pages.keys[..., 0].numel()).int().view(-1, 16)
    kept = torch.stack([torch.randperm(300)[:90].sort().values for _ in range(5)])
    kept[:3] = torch.arange(90)
    lengths = torch.tensor([0, 1, 20, 60, 90])
    kept[3, :60] = torch.randperm(150)[:60].sort().values
    pools = [(pages.keys.clone(), pages.values.clone(), positions.clone()) for _ in range(2)]
    on_cpu.compact(pools[0], pages.pages[0], kept, lengths)
    recompression.compact(pools[1], pages.pages[0], kept, lengths)
    for own, expected in zip(*pools, strict=True):
        assert torch.equal(own.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("method", RECOMPRESSIONS)
def test_a_batch_of_heads_keeps_what_it_keeps_with_the_reference(method: str) -> None:
    lengths, budgets = (16, 17, 65, 100), torch.tensor([9, 16, 12, 64])
    pages = alike(heads_in_pages(lengths, 64), 30)
    queries = torch.randn(len(lengths), 2, WINDOW, 64).bfloat16()
    rule = recompression_rule(Recompression(method=method, window_size=WINDOW, kernel_size=3))

    def kept(kernels: RecompressionKernels, queries: Tensor, keys: Tensor) -> Tensor:
        asked = torch.tensor(lengths)
        heads = PagedHeads(queries, keys, pages.pages[0], asked, 0.125, kernels)
        return entries_to_keep(heads, rule, budgets, 9, 64)

    found = kept(choice.ON_CPU, queries, pages.keys)
    expected = kept(choice.REFERENCE, queries.float(), pages.keys.float())
    for own, other, budget in zip(found, expected, budgets.tolist(), strict=True):
        assert own[:budget].tolist() == other[:budget].tolist()


def test_they_are_used_for_bfloat16_in_whole_vectors() -> None:
    keys = torch.empty(1, 16, 64, dtype=torch.bfloat16)
    for known in (keys, keys.to(torch.int8)):
        assert choice.recompression_kernels(known, torch.bfloat16, 4) is choice.ON_CPU
        choice.try_out(choice.ON_CPU, known, torch.bfloat16, 4)
    for other in (keys.float(), keys.to(torch.int8), keys[..., :48], keys[:, :8]):
        assert choice.recompression_kernels(other, other.dtype, 4) is choice.REFERENCE
