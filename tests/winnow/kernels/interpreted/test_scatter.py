"""A layer's entries in their slots, against the reference."""

import pytest
import torch

from winnow.kernels import scatter as reference
from winnow.kernels.gpu import scatter as on_gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("num_entries", [0, 1, 31, 32, 33, 100])
def test_equals_the_reference_bit_for_bit(
    num_entries: int, head_dim: int, dtype: torch.dtype
) -> None:
    keys, values = torch.randn(2, num_entries, head_dim).to(dtype)
    positions = torch.arange(num_entries, dtype=torch.int32) * 3
    slots = torch.randperm(160)[:num_entries]
    pools = [
        (*torch.zeros(2, 160, head_dim).to(dtype), torch.zeros(160, dtype=torch.int32))
        for _ in range(2)
    ]
    on_gpu.scatter((keys, values, positions), slots, pools[0])
    reference.scatter((keys, values, positions), slots, pools[1])
    for own, expected in zip(*pools, strict=True):
        assert torch.equal(own, expected)
