import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.kv_quantization import dequantize, quantize

LARGEST = 127 * 65504.0  # the largest float16 as a scale
NUMBERS = st.one_of(
    st.floats(-LARGEST, LARGEST, width=32),
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),  # scales that are float16's smallest numbers
    st.just(0.0),
)
VECTORS = st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=4)


@given(VECTORS)
def test_no_error_exceeds_half_the_scale_which_follows_the_largest_number(
    numbers: list[list[float]],
) -> None:
    vectors = torch.tensor(numbers)
    levels, scales = quantize(vectors)
    assert (levels.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert levels.min() >= -127
    errors = (vectors.double() - dequantize(levels, scales, torch.float64)).abs().amax(-1)
    largest = vectors.double().abs().amax(-1)
    assert (errors <= scales.double() / 2).all()
    assert (errors <= largest / 253 + 3e-8).all()
    assert (scales[largest == 0] == 0).all()


@given(st.lists(st.floats(-1000, 1000, width=16), min_size=4, max_size=4), st.integers(0, 3))
def test_quantizing_again_changes_nothing(numbers: list[float], idx: int) -> None:
    numbers[idx] = 0.01 + abs(numbers[idx])
    once = quantize(torch.tensor([numbers]))
    again = quantize(dequantize(*once, torch.float32))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_vector_has_a_scale_of_its_own(dtype: torch.dtype) -> None:
    vectors = (torch.randn(2, 5, 64) * 10 ** torch.arange(-2.0, 3.0)[:, None]).to(dtype)
    back = dequantize(*quantize(vectors), dtype)
    assert back.dtype == dtype
    largest = vectors.float().abs().amax(-1, keepdim=True)
    assert ((back - vectors).float().abs() <= largest / 120).all()


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 127 * 65600.0])
def test_what_is_not_finite_or_too_large_comes_back_as_nan(number: float) -> None:
    vectors = torch.ones(3, 4)
    vectors[1, 2] = number
    levels, scales = quantize(vectors)
    back = dequantize(levels, scales, torch.bfloat16)
    assert not scales[1].isfinite()
    assert back[1].isnan().all()
    assert back[[0, 2]].eq(1).all()


def test_no_vectors_have_no_scales() -> None:
    levels, scales = quantize(torch.empty(2, 0, 8))
    assert (levels.shape, scales.shape) == ((2, 0, 8), (2, 0))
    assert dequantize(levels, scales, torch.float16).shape == (2, 0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_same_bits(dtype: torch.dtype) -> None:
    vectors = (torch.randn(4096, 128) * 10 ** torch.linspace(-6, 4, 4096)[:, None]).to(dtype)
    for own, theirs in zip(quantize(vectors), quantize(vectors.cuda()), strict=True):
        assert torch.equal(own, theirs.cpu())
