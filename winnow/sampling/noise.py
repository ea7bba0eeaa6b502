"""Exponential noise as a pure function of (seed, position, counter), on any device.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Tensors have no uint64 arithmetic; int64 wraps
around just so, and its shifts are made logical.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def noise_keys(rows: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """The key of each row's noise, [R].  rows: their seeds and positions."""
    keys = [_mixed(_mixed((seed + _GOLDEN) & _MASK64) ^ position) for seed, position in rows]
    return np.array(keys, dtype=np.uint64).view(np.int64)


def exponential(keys: Tensor, counters: Tensor) -> Tensor:
    """Exponential noise with mean 1: [R, n] float64, positive.

    keys: [R] int64.  counters: [R, n] or [n] int64; equal ones give equal noise.
    """
    state = keys[:, None] + counters * _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    uniform = _shifted(state ^ _shifted(state, 31), 12).double() + 0.5
    return (uniform * 2.0**-52).log_().neg_()  # 52 bits and a half: never 0, never 1


def _mixed(value: int) -> int:
    """SplitMix64's finalizer, a bijection."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK64
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return torch.bitwise_right_shift(value, bits) & ((1 << (64 - bits)) - 1)
