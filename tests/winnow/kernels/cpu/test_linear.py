"""Products with packed weights, against PyTorch's."""

import pytest
import torch

from winnow.kernels.cpu import linear as on_cpu


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 200])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 16), (80, 896), (192, 2064)])
def test_equals_the_plain_product(
    num_outputs: int, num_inputs: int, num_rows: int, with_bias: bool
) -> None:
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    inputs = torch.randn(num_rows, num_inputs).bfloat16()
    bias = torch.randn(num_outputs).bfloat16() if with_bias else None
    product = on_cpu.Product(on_cpu.pack(weight), bias)
    found = on_cpu.linear(inputs, product, num_outputs)
    expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2**-8)


def test_a_row_gets_the_same_bits_whatever_shares_its_batch() -> None:
    inputs = torch.randn(400, 1088).bfloat16()
    product = on_cpu.Product(on_cpu.pack(torch.randn(128, 1088).bfloat16()))
    together = on_cpu.linear(inputs, product, 128)
    for rows in (slice(0, 1), slice(3, 5), slice(190, 400)):
        assert torch.equal(on_cpu.linear(inputs[rows], product, 128), together[rows])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 6, 7, 12, 13, 30])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 16), (80, 2064)])
def test_int8_weights_give_the_product_with_what_they_stand_for(
    num_outputs: int, num_inputs: int, num_rows: int, with_bias: bool
) -> None:
    levels = torch.randint(-128, 128, (num_outputs, num_inputs), dtype=torch.int8)
    scales = torch.rand(num_outputs) / 64
    inputs = torch.randn(num_rows, num_inputs).bfloat16()
    bias = torch.randn(num_outputs).bfloat16() if with_bias else None
    product = on_cpu.Product(on_cpu.pack(levels), bias, scales)
    found = on_cpu.linear(inputs, product, num_outputs)
    expected = inputs.double() @ (levels * scales[:, None].double()).T
    expected += 0 if bias is None else bias.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2**-8)


def test_a_row_gets_the_same_bits_of_int8_weights_whatever_shares_its_batch() -> None:
    inputs = torch.randn(200, 1088).bfloat16()
    levels = torch.randint(-127, 128, (128, 1088), dtype=torch.int8)
    product = on_cpu.Product(on_cpu.pack(levels), None, torch.rand(128))
    together = on_cpu.linear(inputs, product, 128)
    for rows in (slice(0, 1), slice(3, 8), slice(90, 115)):
        assert torch.equal(on_cpu.linear(inputs[rows], product, 128), together[rows])


@pytest.mark.parametrize("num_rows", [64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rows_of_a_packed_weight_are_the_weights(num_rows: int, dtype: torch.dtype) -> None:
    weight = (50 * torch.randn(num_rows, 48)).to(dtype)
    indices = torch.tensor([[0, num_rows - 1], [63, 5]])
    assert torch.equal(on_cpu.rows_of(on_cpu.pack(weight), indices), weight[indices])
