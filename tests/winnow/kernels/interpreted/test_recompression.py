"""Scoring and compaction of many heads at once, against their references and the rule."""

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.pages import Pages, filled_pages
from winnow.compression import recompression_rule
from winnow.compression.recompress import recompress_layer
from winnow.kernels import recompression
from winnow.kernels.gpu import recompression as on_gpu
from winnow.kernels.gpu.attention import HEAD_DIMS
from winnow.kv import LayerKV
from winnow.pruning_settings import Recompression

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WINDOW = 8
LENGTHS = (8, 9, 16, 17, 65, 100)


def heads_in_pages(
    lengths: tuple[int, ...], head_dim: int, page_size: int, dtype: torch.dtype
) -> tuple[Pages, Tensor]:
    """One row whose heads are of these lengths, and a position of each slot."""
    with_next = [[length + 1 for length in lengths]]
    pages = filled_pages(with_next, head_dim=head_dim, page_size=page_size, dtype=dtype)
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


@pytest.mark.parametrize("budget", [12, 20, 64])
def test_a_batch_of_heads_keeps_what_the_rule_keeps_of_each(budget: int) -> None:
    pages, positions = heads_in_pages(LENGTHS, 64, 16, torch.float32)
    queries, lengths = torch.randn(len(LENGTHS), 2, WINDOW, 64), torch.tensor(LENGTHS)
    before = layer_of(pages, positions, lengths, queries)
    rule = recompression_rule(Recompression(window_size=WINDOW, kernel_size=3))
    expected = recompress_layer(before, 0.125, rule, budget)
    scores = on_gpu.window_scores(queries, pages.keys, pages.pages[0], lengths, 0.125)
    kept, new_lengths = recompression.best_entries(scores, lengths, budget, WINDOW, 3)
    on_gpu.compact((pages.keys, pages.values, positions), pages.pages[0], kept, new_lengths)
    after = layer_of(pages, positions, new_lengths, queries)
    assert after.head_lengths == expected.head_lengths
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(after, name), getattr(expected, name))


def layer_of(pages: Pages, positions: Tensor, lengths: Tensor, queries: Tensor) -> LayerKV:
    page_size = pages.keys.shape[1]
    slots = pages.pages[0, :, :, None] * page_size + torch.arange(page_size)
    slots = slots.flatten(1)  # [H_kv, P * page_size]
    slots = slots[torch.arange(slots.shape[1]) < lengths[:, None]]
    return LayerKV(
        layer_idx=0,
        keys=pages.keys.flatten(0, 1)[slots],
        values=pages.values.flatten(0, 1)[slots],
        positions=positions.flatten()[slots],
        head_lengths=tuple(lengths.tolist()),
        window_queries=queries.flatten(0, 1),
    )
