"""RMSNorm, SiLU times the other half and rotation, against their references."""

import pytest
import torch

from winnow.kernels import activation, norm, rope
from winnow.kernels.cpu import activation as activation_on_cpu
from winnow.kernels.cpu import norm as norm_on_cpu
from winnow.kernels.cpu import rope as rope_on_cpu

TOLERANCE = 2**-7  # one last place

sizes = pytest.mark.parametrize("size", [16, 64, 896, 4864])
tokens = pytest.mark.parametrize("num_tokens", [1, 5, 70])


@sizes
@tokens
def test_rms_norm_equals_its_reference(num_tokens: int, size: int) -> None:
    hidden, weight = torch.randn(num_tokens, size).bfloat16(), torch.randn(size).bfloat16()
    found = norm_on_cpu.rms_norm(hidden, weight, 1e-5)
    expected = norm.rms_norm(hidden, weight, 1e-5)
    torch.testing.assert_close(found, expected, atol=0, rtol=2 * TOLERANCE)


@sizes
@tokens
def test_rms_norm_after_the_residual_equals_its_reference(num_tokens: int, size: int) -> None:
    hidden, residual = torch.randn(2, num_tokens, size).bfloat16()
    weight = torch.randn(size).bfloat16()
    normed, total = norm_on_cpu.add_rms_norm(hidden, residual, weight, 1e-6)
    expected = norm.add_rms_norm(hidden, residual, weight, 1e-6)
    assert torch.equal(total, expected[1])
    torch.testing.assert_close(normed, expected[0], atol=0, rtol=2 * TOLERANCE)


@sizes
@tokens
def test_silu_mul_equals_its_reference(num_tokens: int, size: int) -> None:
    gate_up = torch.randn(num_tokens, 2 * size).mul(8).bfloat16()
    found = activation_on_cpu.silu_mul(gate_up)
    expected = activation.silu_mul(gate_up)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2 * TOLERANCE)


def test_the_silu_refuses_rows_that_are_not_whole_vectors() -> None:
    with pytest.raises(AssertionError, match="24 numbers are not whole vectors of 16"):
        activation_on_cpu.silu_mul(torch.zeros(3, 2 * 24).bfloat16())


def test_the_silu_of_numbers_far_from_zero_is_right() -> None:
    gate_up = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]).repeat_interleave(16)
    gate_up = torch.cat([gate_up, torch.ones_like(gate_up)])[None].bfloat16()
    found = activation_on_cpu.silu_mul(gate_up)
    torch.testing.assert_close(found, activation.silu_mul(gate_up), atol=1e-6, rtol=TOLERANCE)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (4, 2), (16, 16)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_rotation_equals_its_reference(
    head_dim: int, num_heads: int, num_kv_heads: int, with_norms: bool
) -> None:
    heads = torch.randn(3, num_heads + 2 * num_kv_heads, head_dim).bfloat16()
    angles = torch.rand(3, head_dim // 2).mul(6).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    query_norm, key_norm = torch.randn(2, head_dim).bfloat16()
    norms = rope.HeadNorms(query_norm, key_norm, eps=1e-6) if with_norms else None
    found, expected = heads.clone(), heads.clone()
    rope_on_cpu.rotate(found, cos, sin, num_heads, num_kv_heads, norms)
    rope.rotate(expected, cos, sin, num_heads, num_kv_heads, norms)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=TOLERANCE)
    assert torch.equal(found[:, -num_kv_heads:], heads[:, -num_kv_heads:])
