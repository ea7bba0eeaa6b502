"""Decode attention: bytes of keys and values per second, by batch, entries, page, block and warps.

The pages of enough layers are read in turn that none is still in the device's cache. Blocks and
warps are the kernel's constants; `chosen` are those that decode uses. Others, each of which has to
be compiled, are measured at one number of entries and one page size, after all that is chosen. The
PyTorch reference, on a CPU, has neither. `most` is what heads have room for: in a recorded step as
many splits are started of each as the longest head in the table may have.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.on_device.pages import append_and_attend, kernel, random_pages
from benchmarks.on_device.section import Bench, Figure, Result, attempt, measured
from benchmarks.on_device.timing import device_seconds

Launch = tuple[int, int]  # block and warps


def measure(bench: Bench) -> Result:
    rows = list(_rows(bench))
    entries, batches = bench.scale.entries, [batch for batch in bench.scale.batches if batch >= 8]
    chosen = [
        share
        for batch in batches
        for share in measured(rows, "of copy", batch=batch, most=entries, page=16, chosen=True)
    ]
    if not chosen:
        return Result(rows)
    name = f"attention, share of a copy's bandwidth ({entries} entries, batch 8 and more)"
    return Result(rows, [Figure(name, min(chosen), at_least=0.8)])


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    module = kernel("attention", bench.device)
    sizes = bench.scale
    used: Launch | None = None
    if bench.is_cuda:
        used = (module.block_size(bench.shape.head_dim), module.NUM_WARPS)
    for batch, entries, page in product(sizes.batches, sizes.lengths, sizes.page_sizes):
        yield from _of_size(module, bench, (batch, entries, page, entries), [used], used)
    for batch in sizes.batches:
        size = (batch, sizes.entries, sizes.page_sizes[0], sizes.wide_entries)
        yield from _of_size(module, bench, size, [used], used)
    others = [launch for launch in product(sizes.blocks, sizes.warps) if launch != used]
    for batch in sizes.batches if bench.is_cuda else ():
        size = (batch, sizes.entries, sizes.page_sizes[0], sizes.entries)
        yield from _of_size(module, bench, size, others, used)


def _of_size(
    module: Any,  # noqa: ANN401
    bench: Bench,
    size: tuple[int, int, int, int],
    launches: Sequence[Launch | None],
    used: Launch | None,
) -> Iterator[dict[str, Any]]:
    """size: batch, entries, page size, and the most entries that a head has room for."""
    batch, entries, page, most = size
    steps = _steps(bench, *size)
    for launch in launches:
        block, warps = launch or (None, None)
        labels: dict[str, Any] = {"batch": batch, "entries": entries, "page": page, "most": most}
        labels |= {"block": block, "warps": warps, "chosen": launch == used}
        yield attempt(labels, partial(_row, module, bench, steps, launch, batch * entries))


def _row(
    module: Any,  # noqa: ANN401
    bench: Bench,
    steps: list[Callable[[], object]],
    launch: Launch | None,
    num_entries: int,
) -> dict[str, float]:
    nbytes = bench.shape.kv_bytes(num_entries * bench.shape.num_kv_heads)
    with _launched_as(module, launch):
        seconds = device_seconds(steps, bench.device)
    bandwidth = nbytes / seconds
    return {
        "µs": seconds * 1e6,
        "GB/s": bandwidth / 1e9,
        "of copy": bandwidth / bench.copy_bandwidth,
    }


def _launched_as(module: Any, launch: Launch | None) -> AbstractContextManager[object]:  # noqa: ANN401
    if launch is None:
        return nullcontext()
    block, warps = launch
    return patch.multiple(module, block_size=lambda *_, **__: block, NUM_WARPS=warps)


def _steps(
    bench: Bench, batch: int, entries: int, page_size: int, most: int
) -> list[Callable[[], object]]:
    """One call for each of as many layers as hold `layer_bytes` together."""
    shape, head_dim = bench.shape, bench.shape.head_dim
    lengths = torch.full((batch, shape.num_kv_heads), entries, device=bench.device)
    nbytes = shape.kv_bytes(lengths.numel() * entries)
    query = torch.randn(batch, shape.num_heads, head_dim, dtype=bench.dtype, device=bench.device)
    new = torch.randn(batch, shape.num_kv_heads, head_dim, dtype=bench.dtype, device=bench.device)
    steps: list[Callable[[], object]] = []
    for _ in range(max(2, math.ceil(bench.scale.layer_bytes / nbytes))):
        own = replace(random_pages(lengths, page_size, head_dim, bench.dtype), most=most)
        steps.append(partial(append_and_attend, query, (new, new), own))
    return steps
