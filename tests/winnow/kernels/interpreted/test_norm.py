"""RMSNorm and SiLU times the other half, against their references."""

import pytest
import torch

from winnow.kernels import activation, norm
from winnow.kernels.gpu import activation as activation_on_gpu
from winnow.kernels.gpu import norm as norm_on_gpu

# In bfloat16 the interpreter cuts off what PyTorch rounds: one last place for each of three times.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 3 * 2**-7}
SIZES = (64, 96, 576, 1000, 2048)

pytestmark = [
    pytest.mark.parametrize("dtype", TOLERANCES),
    pytest.mark.parametrize("size", SIZES),
    pytest.mark.parametrize("num_tokens", [1, 5]),
]


def test_rms_norm_equals_its_reference(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(num_tokens, size).to(dtype), torch.randn(size).to(dtype)
    output = norm_on_gpu.rms_norm(hidden, weight, 1e-5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        output, norm.rms_norm(hidden, weight, 1e-5), atol=tolerance, rtol=tolerance
    )


def test_rms_norm_after_the_residual_equals_its_reference(
    num_tokens: int, size: int, dtype: torch.dtype
) -> None:
    hidden, residual = torch.randn(2, num_tokens, size).to(dtype)
    weight, tolerance = torch.randn(size).to(dtype), TOLERANCES[dtype]
    normed, total = norm_on_gpu.add_rms_norm(hidden, residual, weight, 1e-6)
    expected = norm.add_rms_norm(hidden, residual, weight, 1e-6)
    torch.testing.assert_close(total, expected[1], atol=0, rtol=tolerance / 3)
    torch.testing.assert_close(normed, expected[0], atol=tolerance, rtol=tolerance)


def test_silu_mul_equals_its_reference(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    gate_up, tolerance = torch.randn(num_tokens, 2 * size).mul(4).to(dtype), TOLERANCES[dtype]
    output = activation_on_gpu.silu_mul(gate_up)
    torch.testing.assert_close(output, activation.silu_mul(gate_up), atol=tolerance, rtol=tolerance)
