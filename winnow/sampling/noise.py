"""Exponential noise as a pure function of (seed, position, counter), on any device.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in int64 arithmetic, which wraps around. All shifts
are logical.
"""

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """The key of each row's noise.  seeds, positions and the result: [R] int64."""
    return _mixed(_mixed(seeds + _GOLDEN) ^ positions)


def exponential(keys: Tensor, counters: Tensor) -> Tensor:
    """Exponential noise with mean 1: [R, n] float64, positive.

    keys: [R] int64.  counters: [R, n] or [n] int64; equal ones give equal noise.
    """
    uniform = _shifted(_mixed(keys[:, None] + counters * _GOLDEN), 12).double() + 0.5
    return (uniform * 2.0**-52).log_().neg_()  # 52 bits and a half: never 0, never 1


def _mixed(value: Tensor) -> Tensor:
    """SplitMix64's finalizer, a bijection."""
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return torch.bitwise_right_shift(value, bits) & ((1 << (64 - bits)) - 1)
