"""Recompression while decoding: what it adds to the engine's steps, and its kernels alone.

Steps are counted over one interval with one cut in it, beside as many
steps of as many entries without.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.decode import our_step
from benchmarks.on_device.model import random_decoder
from benchmarks.on_device.pages import random_pages
from benchmarks.on_device.section import Bench, Figure, Result, attempt, measured
from benchmarks.on_device.timing import device_seconds, seconds_per_call
from winnow.compression import recompression_rule
from winnow.compression.choice import REFERENCE, triton_kernels
from winnow.compression.heads import PagedHeads
from winnow.compression.recompress import entries_to_keep
from winnow.decoder import DecoderModel
from winnow.pruning_settings import Recompression

_WINDOW = 32


def measure(bench: Bench) -> Result:
    model = random_decoder(bench)
    rows = [attempt({"what": "kernels of one cut"}, partial(_kernels, model, bench))]
    rows += [
        attempt({"what": f"steps at batch {batch}"}, partial(_steps, model, bench, batch))
        for batch in bench.scale.batches
    ]
    figures = [Figure("a cut of all layers and heads, ms", ms) for ms in measured(rows, "cut ms")]
    if added := measured(rows, "added"):
        figures.append(Figure("recompression, of a step's time", max(added), at_most=0.05))
    return Result(rows, figures)


def _kernels(model: DecoderModel, bench: Bench) -> dict[str, float]:
    """Score, choose and compact every (layer, KV head) of one sequence."""
    shape, scale = model.shape, bench.scale
    heads = shape.num_layers * shape.num_kv_heads
    num_entries = scale.entries + scale.recompress_interval
    lengths = torch.full((heads, 1), num_entries, device=bench.device)
    pages = random_pages(lengths, 16, shape.head_dim, bench.dtype)
    group = shape.num_heads // shape.num_kv_heads
    size = (heads, group, _WINDOW, shape.head_dim)
    queries = torch.randn(size, dtype=bench.dtype, device=bench.device)
    table, flat = pages.table[:, 0].contiguous(), lengths[:, 0].contiguous()
    kernels = triton_kernels() if bench.device.type == "cuda" else REFERENCE
    rule = recompression_rule(_recompression(bench))
    budgets = torch.full_like(flat, scale.entries)

    def cut() -> None:
        paged = PagedHeads(queries, pages.keys, table, flat, shape.head_dim**-0.5, kernels)
        kept = entries_to_keep(paged, rule, budgets, scale.entries, scale.entries)
        kernels.compact((pages.keys, pages.values, pages.positions), table, kept, budgets)

    seconds = device_seconds([cut] * 3, bench.device)
    floor = 3 * pages.keys.nbytes / bench.copy_bandwidth  # keys scored, then keys and values moved
    return {"entries": num_entries, "cut ms": seconds * 1e3, "floor ms": floor * 1e3}


def _steps(model: DecoderModel, bench: Bench, batch: int) -> dict[str, Any]:
    """The mean step from the budget until all sequences are cut, and without the cut."""
    scale = bench.scale
    calls = scale.recompress_interval + 1
    plain, cut = (
        seconds_per_call(
            our_step(model, batch, scale.entries, calls + 1, recompression), calls, rounds=1
        )
        for recompression in (Recompression(), _recompression(bench))
    )
    return {"step ms": plain * 1e3, "with cuts ms": cut * 1e3, "added": cut / plain - 1}


def _recompression(bench: Bench) -> Recompression:
    return Recompression(
        decode_budget=bench.scale.entries,
        recompress_interval=bench.scale.recompress_interval,
        window_size=_WINDOW,
    )
