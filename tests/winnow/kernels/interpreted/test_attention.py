"""Split attention over pages, against its reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.winnow.kernels.pages import Pages, filled_pages
from winnow.kernels import attention
from winnow.kernels.gpu import attention as on_gpu
from winnow.kernels.variant import PLAIN, Variant
from winnow.kv_quantization import quantize

TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EDGES = [[1, 2], [15, 16], [17, 33], [0, 0], [64, 65]]


def random_step(
    pages: Pages, group: int, head_dim: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A query, key and value per row, as views into one product, as a fused projection has them."""
    num_rows, num_kv_heads = pages.lengths.shape
    heads = [num_kv_heads * group, num_kv_heads, num_kv_heads]
    product = torch.randn(num_rows, sum(heads), head_dim).to(dtype or pages.keys.dtype)
    query, new_keys, new_values = torch.split(product, heads, dim=1)
    return query, new_keys, new_values


def attend(
    pages: Pages,
    step: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    variant: Variant = PLAIN,
) -> Tensor:
    return on_gpu.append_and_attend(*step, *pages.arguments(scaling, variant))


def require_equal(
    pages: Pages, group: int, dtype: torch.dtype | None = None, variant: Variant = PLAIN
) -> None:
    """dtype: of queries and new entries, if it is not that of the pages."""
    head_dim, dtype = pages.keys.shape[-1], dtype or pages.keys.dtype
    step = random_step(pages, group, head_dim, dtype)
    other = pages.copy()
    expected = attention.append_and_attend(*step, *other.arguments(head_dim**-0.5, variant))
    output = attend(pages, step, head_dim**-0.5, variant)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    for own, reference in ((pages.keys, other.keys), (pages.values, other.values)):
        assert torch.equal(own.nan_to_num(7), reference.nan_to_num(7))
    if pages.scales is not None and other.scales is not None:
        assert torch.equal(pages.scales.nan_to_num(7), other.scales.nan_to_num(7))


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", on_gpu.HEAD_DIMS)
def test_equals_the_reference_at_page_boundaries_and_in_empty_rows(
    head_dim: int, dtype: torch.dtype, page_size: int
) -> None:
    pages = filled_pages(EDGES, head_dim=head_dim, page_size=page_size, dtype=dtype)
    require_equal(pages, group=2)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype"),
    [
        (64, 16, torch.float32),
        (96, 32, torch.float16),
        (128, 16, torch.bfloat16),
        (256, 64, torch.float16),
    ],
)
def test_equals_the_reference_on_int8_pages(
    head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    pages = filled_pages(EDGES, head_dim=head_dim, page_size=page_size, dtype=dtype)
    require_equal(pages.quantized(), 2, dtype)


def test_equals_the_reference_on_int8_pages_of_several_splits() -> None:
    lengths = [[1, on_gpu.SPLIT + 2], [2 * on_gpu.SPLIT + 77, 0]]
    pages = filled_pages(lengths, head_dim=64, page_size=16, dtype=torch.float32)
    require_equal(pages.quantized(), 4, torch.float32)


@pytest.mark.parametrize(
    "vector",
    [
        [0.0] * 64,
        [1e-7, -3e-8, *[0.0] * 62],  # a scale that is float16's smallest number
        [127 * 65504.0, *[-1.0] * 63],
        [float(2**idx % 1013) * (-1) ** idx for idx in range(64)],
    ],
)
def test_a_new_entry_is_quantized_to_the_same_bits(vector: list[float]) -> None:
    pages = filled_pages([[1]], head_dim=64, page_size=16, dtype=torch.float32).quantized()
    new = torch.tensor(vector).view(1, 1, 64)
    attend(pages, (torch.ones(1, 1, 64), new, -new), 0.125)
    levels, scales = quantize(torch.stack([new[0, 0], -new[0, 0]]))
    slot = int(pages.slots)
    assert pages.scales is not None
    assert torch.equal(pages.scales.flatten(0, 1)[slot], scales)
    for part, own in zip((pages.keys, pages.values), levels, strict=True):
        assert torch.equal(part.flatten(0, 1)[slot], own)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e7])
def test_a_new_entry_that_int8_cannot_hold_makes_the_output_nan(number: float) -> None:
    pages = filled_pages([[20], [20]], head_dim=64, page_size=16, dtype=torch.float32).quantized()
    new = torch.ones(2, 1, 64)
    new[1, 0, 5] = number
    output = attend(pages, (torch.ones(2, 1, 64), torch.ones(2, 1, 64), new), 0.125)
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


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


@pytest.mark.parametrize("window", [1, 20, 600])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (2.0, False), (3.0, True)])
def test_a_window_softcap_and_sinks_are_as_in_the_reference(
    window: int, softcap: float | None, has_sinks: bool
) -> None:
    lengths = [*EDGES, [on_gpu.SPLIT + 2, 2 * on_gpu.SPLIT + 77]]
    pages = filled_pages(lengths, head_dim=64, page_size=16, dtype=torch.float16)
    sinks = torch.randn(6).half() if has_sinks else None
    require_equal(pages, 3, variant=replace(pages.seen(window), softcap=softcap, sinks=sinks))


def test_a_softcap_of_int8_keys_is_as_in_the_reference() -> None:
    pages = filled_pages(EDGES, head_dim=64, page_size=16, dtype=torch.float16)
    require_equal(pages.quantized(), 2, torch.float16, replace(pages.seen(9), softcap=1.5))


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
