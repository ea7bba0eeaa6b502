import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.sampling.noise import exponential, noise_keys

_MASK = (1 << 64) - 1
INT64 = st.integers(-(2**63), 2**63 - 1)


def mix(value: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def keys_of(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(noise_keys(rows))


@given(seed=INT64, position=st.integers(0, 2**40), counter=st.integers(-2000, 2**20))
def test_noise_is_splitmix64s(seed: int, position: int, counter: int) -> None:
    keys = keys_of((seed, position), (1, 1))
    key = mix(mix((seed + 0x9E3779B97F4A7C15) & _MASK) ^ position)
    assert int(keys[0]) & _MASK == key
    uniform = ((mix((key + counter * 0x9E3779B97F4A7C15) & _MASK) >> 12) + 0.5) / 2**52
    expected = -torch.tensor(uniform, dtype=torch.float64).log()
    assert float(exponential(keys, torch.tensor([counter]))[0, 0]) == pytest.approx(float(expected))


def test_noise_is_exponential_and_never_0() -> None:
    keys = keys_of(*((at, at) for at in range(100)))
    found = exponential(keys, torch.arange(1000)).flatten()
    assert bool((found > 0).all() and found.isfinite().all())
    counts = torch.histc((-found).exp(), bins=50, min=0, max=1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 100  # chi-square, 49 degrees


@pytest.mark.parametrize("shift", [1, 256])
def test_neighbours_are_independent(shift: int) -> None:
    """Of seed, position and counter."""
    counters = torch.arange(20_000)
    one = exponential(keys_of((5, 9)), counters)[0]
    others = [
        exponential(keys_of((5 + shift, 9)), counters),
        exponential(keys_of((5, 9 + shift)), counters),
        exponential(keys_of((5, 9)), counters + shift),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([one, other[0]]))[0, 1])) < 0.03
