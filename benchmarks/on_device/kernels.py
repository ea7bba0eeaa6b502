"""Each kernel's largest error against float64, its time, and its share of a copy's bandwidth.

Shapes are those of one decode step of the model, at its largest batch. Kernels that only move
entries must give the reference's result to the bit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.on_device.kernel_cases import CASES, Case, Sizes
from benchmarks.on_device.section import Bench, Figure, Result, attempt
from benchmarks.on_device.timing import device_seconds

# Largest error, of the largest value: of a result that is rounded twice on its way.
_LIMITS = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def measure(bench: Bench) -> Result:
    rows = list(_rows(bench))
    wrong = sum("error" in row or row["off"] > row["limit"] for row in rows)
    return Result(rows, [Figure("kernels off float64, or failing", wrong, at_most=0)])


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for dtype in _LIMITS:
        sizes = _sizes(bench, dtype)
        for name, make in CASES.items():
            labels = {"kernel": name, "dtype": str(dtype).removeprefix("torch.")}
            yield attempt(labels, partial(_row, make, bench, sizes))


def _row(make: Callable[[Sizes], Case], bench: Bench, sizes: Sizes) -> dict[str, Any]:
    case = make(sizes)
    got = case.run().double()
    off = float((got - case.wanted.double()).abs().max() / case.wanted.double().abs().max())
    seconds = device_seconds([case.run] * bench.scale.calls, sizes.device)
    return {
        "off": off,
        "limit": 0.0 if case.is_exact else _LIMITS[sizes.dtype],
        "µs": seconds * 1e6,
        "GB/s": case.nbytes / seconds / 1e9,
        "of copy": case.nbytes / seconds / bench.copy_bandwidth,
    }


def _sizes(bench: Bench, dtype: torch.dtype) -> Sizes:
    shape = bench.shape
    return Sizes(
        batch=bench.scale.batches[-1],
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=bench.scale.model["intermediate_size"],
        entries=bench.scale.entries,
        page_size=16,
        device=bench.device,
        dtype=dtype,
    )
