"""Rotation and head norms, against their reference and transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from winnow.kernels import rope
from winnow.kernels.gpu import rope as on_gpu
from winnow.kernels.gpu.attention import HEAD_DIMS

TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def tables(num_rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(num_rows, head_dim // 2).mul(6).repeat(1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (4, 2), (16, 16)])
def test_equals_the_reference(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, with_norms: bool
) -> None:
    for head_dim in HEAD_DIMS:
        heads = torch.randn(3, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
        cos, sin = (table.to(dtype) for table in tables(3, head_dim))
        query_norm, key_norm = torch.randn(2, head_dim).to(dtype)
        norms = rope.HeadNorms(query_norm, key_norm, eps=1e-6) if with_norms else None
        output, expected = heads.clone(), heads.clone()
        on_gpu.rotate(output, cos, sin, num_heads, num_kv_heads, norms)
        rope.rotate(expected, cos, sin, num_heads, num_kv_heads, norms)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(output[:, -num_kv_heads:], heads[:, -num_kv_heads:])


def test_rotates_as_transformers_does() -> None:
    heads = torch.randn(2, 8, 64)
    cos, sin = tables(2, 64)
    query, key = apply_rotary_pos_emb(
        heads[:, :4, None], heads[:, 4:6, None], cos[:, None], sin[:, None]
    )
    on_gpu.rotate(heads, cos, sin, 4, 2)
    torch.testing.assert_close(heads[:, :6], torch.cat([query, key], 1)[:, :, 0])
