"""Scoring and compaction of many heads at once, against their references."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.pages import Pages, filled_pages
from winnow.catalog import RECOMPRESSIONS
from winnow.compression import choice, recompression_rule
from winnow.compression.heads import PagedHeads
from winnow.compression.recompress import entries_to_keep
from winnow.kernels import recompression
from winnow.kernels.gpu import recompression as on_gpu
from winnow.kernels.gpu.attention import HEAD_DIMS
from winnow.kv_quantization import quantize
from winnow.pruning_settings import Recompression

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WINDOW = 8
LENGTHS = (8, 9, 16, 17, 65, 100)


def heads_in_pages(
    lengths: tuple[int, ...], head_dim: int, page_size: int, dtype: torch.dtype
) -> tuple[Pages, Tensor]:
    """One row whose heads are of these lengths, and a position of each slot."""
    with_next = [[length + 1 for length in lengths]]
    pages = filled_pages(with_next, head_dim=head_dim, page_size=page_size, dtype=dtype).row(0)
    return pages, torch.randperm(pages.keys[..., 0].numel()).int().view(-1, page_size)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_equal_the_reference(head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    pages, _ = heads_in_pages(LENGTHS, head_dim, page_size, dtype)
    queries = torch.randn(len(LENGTHS), 2, WINDOW, head_dim).to(dtype)
    step = (queries, pages.keys, pages.pages[0], torch.tensor(LENGTHS), head_dim**-0.5)
    scores = on_gpu.window_scores(*step)
    tolerance = TOLERANCES[dtype]
    expected = recompression.window_scores(*step)
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        scores.sum(1), torch.full((len(LENGTHS),), 2.0 * WINDOW), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("group", [1, 5, 16])
def test_scores_equal_the_reference_for_each_group_size(group: int) -> None:
    pages, _ = heads_in_pages((40, 70), 64, 16, torch.float32)
    queries = torch.randn(2, group, WINDOW, 64)
    step = (queries, pages.keys, pages.pages[0], torch.tensor([40, 70]), 0.125)
    torch.testing.assert_close(on_gpu.window_scores(*step), recompression.window_scores(*step))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compaction_equals_the_reference_bit_for_bit(head_dim: int, dtype: torch.dtype) -> None:
    pages, positions = heads_in_pages((0, 1, 20, 150, 300), head_dim, 16, dtype)
    kept = torch.stack([torch.randperm(300)[:90].sort().values for _ in range(5)])
    kept[:3] = torch.arange(90)
    lengths = torch.tensor([0, 1, 20, 60, 90])
    kept[3, :60] = torch.randperm(150)[:60].sort().values
    pools = [(pages.keys.clone(), pages.values.clone(), positions.clone()) for _ in range(2)]
    on_gpu.compact(pools[0], pages.pages[0], kept, lengths)
    recompression.compact(pools[1], pages.pages[0], kept, lengths)
    for own, expected in zip(*pools, strict=True):
        assert torch.equal(own.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_int8_keys_score_as_the_reference_scores_them_and_move_with_their_scales(
    dtype: torch.dtype,
) -> None:
    pages, positions = heads_in_pages(LENGTHS, 64, 16, torch.float32)
    (keys, values), scales = quantize(torch.stack([pages.keys, pages.values]).nan_to_num(3))
    queries, lengths = torch.randn(len(LENGTHS), 2, WINDOW, 64).to(dtype), torch.tensor(LENGTHS)
    scales = scales.movedim(0, -1).contiguous()
    step = (queries, keys, pages.pages[0], lengths, 0.125, scales)
    tolerance = TOLERANCES[dtype]
    scores, expected = on_gpu.window_scores(*step), recompression.window_scores(*step)
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=tolerance)
    kept = torch.stack([torch.randperm(length)[:8].sort().values for length in LENGTHS])
    pools = [tuple(part.clone() for part in (keys, values, positions, scales)) for _ in range(2)]
    for kernels, pool in zip((on_gpu, recompression), pools, strict=True):
        kernels.compact(pool, pages.pages[0], kept, torch.tensor([8, 7, 6, 8, 1, 0]))
    assert all(map(torch.equal, *pools))


@pytest.mark.parametrize("method", RECOMPRESSIONS)
def test_a_batch_of_heads_keeps_what_it_keeps_with_the_reference(method: str) -> None:
    lengths, budgets = (16, 17, 65, 100), torch.tensor([9, 16, 12, 64])
    pages, positions = heads_in_pages(lengths, 64, 16, torch.float32)
    queries, asked = torch.randn(len(lengths), 2, WINDOW, 64), torch.tensor(lengths)
    rule = recompression_rule(Recompression(method=method, window_size=WINDOW, kernel_size=3))
    results = []
    for kernels in (choice.triton_kernels(), choice.REFERENCE):
        pool = (pages.keys.clone(), pages.values.clone(), positions.clone())
        heads = PagedHeads(queries, pool[0], pages.pages[0], asked, 0.125, kernels)
        kept = entries_to_keep(heads, rule, budgets, 9, 64)
        kernels.compact(pool, pages.pages[0], kept, budgets)
        results.append((kept, *pool))
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_trial_before_use_passes(dtype: torch.dtype) -> None:
    for held in (dtype, torch.int8):
        choice.try_out_triton(torch.empty(1, 16, 64, dtype=held), dtype, 4)


def wrong_scores(*args: Any) -> Tensor:
    return on_gpu.window_scores(*args) + 1.6


def wrong_moves(pool: Any, pages: Tensor, kept: Tensor, lengths: Tensor) -> None:
    on_gpu.compact(pool, pages, kept, lengths - 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_scores": wrong_scores}, r"their scores are 0\.1 off; the limit is 0\.02"),
        ({"compact": wrong_moves}, "they move entries to the wrong places"),
    ],
)
def test_the_trial_before_use_fails_where_results_differ(wrong: Any, message: str) -> None:
    kernels = replace(choice.triton_kernels(), **wrong)
    with pytest.raises(RuntimeError, match=message):
        choice.try_out(kernels, torch.empty(1, 16, 64), torch.float32, 2)
