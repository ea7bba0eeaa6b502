"""The reference of decode attention, where numbers are not finite or there is nothing."""

import pytest
import torch

from tests.winnow.kernels.pages import filled_pages
from winnow.kernels.attention import append_and_attend
from winnow.kernels.variant import PLAIN, Variant


@pytest.mark.parametrize("variant", [PLAIN, Variant(softcap=5.0), Variant(sinks=torch.zeros(4))])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_a_number_comes_out_and_a_head_without_entries_gives_zeros(
    part: int, variant: Variant
) -> None:
    pages = filled_pages([[9, 0], [1, 3]], head_dim=8, page_size=4, dtype=torch.float32)
    query, keys, values = (torch.randn(2, heads, 8) for heads in (4, 2, 2))
    (query, keys)[part][:, :, 5] = torch.nan
    found = append_and_attend(query, keys, values, *pages.arguments(0.3, variant))
    is_zero = torch.tensor([[False, False, True, True], [False] * 4])
    assert torch.equal(found.isnan(), ~is_zero[..., None].expand_as(found))
    assert (found[is_zero] == 0).all()
