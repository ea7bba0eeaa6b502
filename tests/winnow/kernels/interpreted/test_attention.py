"""Split attention over pages, against its reference."""

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.pages import Pages, filled_pages
from winnow.kernels import attention
from winnow.kernels.gpu import attention as on_gpu

TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EDGES = [[1, 2], [15, 16], [17, 33], [0, 0], [64, 65]]


def random_step(pages: Pages, group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query, key and value per row, as views into one product, as a fused projection has them."""
    num_rows, num_kv_heads = pages.lengths.shape
    heads = [num_kv_heads * group, num_kv_heads, num_kv_heads]
    product = torch.randn(num_rows, sum(heads), head_dim).to(pages.keys.dtype)
    query, new_keys, new_values = torch.split(product, heads, dim=1)
    return query, new_keys, new_values


def attend(pages: Pages, step: tuple[Tensor, Tensor, Tensor], scaling: float) -> Tensor:
    return on_gpu.append_and_attend(
        *step, pages.keys, pages.values, pages.slots, pages.pages, pages.lengths, scaling
    )


def require_equal(pages: Pages, group: int) -> None:
    head_dim, dtype = pages.keys.shape[-1], pages.keys.dtype
    step = random_step(pages, group, head_dim)
    other = pages.copy()
    expected = attention.append_and_attend(
        *step, other.keys, other.values, other.slots, other.pages, other.lengths, head_dim**-0.5
    )
    output = attend(pages, step, head_dim**-0.5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    for own, reference in ((pages.keys, other.keys), (pages.values, other.values)):
        assert torch.equal(own.nan_to_num(7), reference.nan_to_num(7))


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", on_gpu.HEAD_DIMS)
def test_equals_the_reference_at_page_boundaries_and_in_empty_rows(
    head_dim: int, dtype: torch.dtype, page_size: int
) -> None:
    pages = filled_pages(EDGES, head_dim=head_dim, page_size=page_size, dtype=dtype)
    require_equal(pages, group=2)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_equals_the_reference_for_each_group_size(group: int) -> None:
    pages = filled_pages([[1, 70], [40, 5]], head_dim=64, page_size=16, dtype=torch.float32)
    require_equal(pages, group)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_the_reference_where_heads_have_different_numbers_of_splits(
    dtype: torch.dtype,
) -> None:
    split = on_gpu.SPLIT
    lengths = [[1, split], [split + 1, split + 2], [2 * split + 1, 3 * split + 77]]
    pages = filled_pages(lengths, head_dim=64, page_size=32, dtype=dtype)
    require_equal(pages, group=2)


def test_equals_the_reference_where_more_splits_are_merged_than_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_gpu, "SPLIT", 64)
    pages = filled_pages([[64 * 35]], head_dim=64, page_size=64, dtype=torch.float32)
    require_equal(pages, group=1)


def test_a_row_gives_the_same_bits_whatever_shares_its_batch() -> None:
    lengths = [[3, 600], [1, 1], [1400, 0]]
    pages = filled_pages(lengths, head_dim=64, page_size=16, dtype=torch.float16)
    step = random_step(pages, 4, 64)
    together = attend(pages, step, 0.125)
    for idx in range(len(lengths)):
        query, new_keys, new_values = (part[idx : idx + 1] for part in step)
        alone = attend(pages.row(idx), (query, new_keys, new_values), 0.125)
        assert torch.equal(alone[0], together[idx])


def test_refuses_more_query_heads_per_kv_head_than_a_tile_has_rows() -> None:
    pages = filled_pages([[3]], head_dim=64, page_size=16, dtype=torch.float32)
    with pytest.raises(AssertionError, match="17 query heads share a KV head; the limit is 16"):
        attend(pages, random_step(pages, 17, 64), 0.125)
