"""The next token of a batch from its logits, read by the host, as a decode step needs it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_device.section import Bench, Figure, Result, attempt, measured
from benchmarks.on_device.timing import seconds_per_call
from benchmarks.sampling import SETTINGS, sequence
from winnow.sampling import sample_batch
from winnow.sampling_params import SamplingParams


def measure(bench: Bench) -> Result:
    rows = list(_rows(bench))
    figures = []
    for setting in ("greedy", "temperature 0.7"):
        batch = bench.scale.batches[-1]
        if found := measured(rows, "ms", setting=setting, batch=batch):
            figures.append(Figure(f"sampler, {setting}, batch {batch}, ms", found[0]))
    return Result(rows, figures)


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    vocab_size = max(bench.scale.model["vocab_size"], 4096)  # the prompts of `sequence` fit in
    for batch in bench.scale.batches:
        logits = 3 * torch.randn(batch, vocab_size, device=bench.device)
        for name, changes in SETTINGS.items():
            params = SamplingParams(**changes)
            labels = {"setting": name, "batch": batch, "vocabulary": vocab_size}
            yield attempt(labels, partial(_row, bench, logits, params))


def _row(bench: Bench, logits: Tensor, params: SamplingParams) -> dict[str, float]:
    states = [sequence(params) for _ in logits]
    seconds = seconds_per_call(
        lambda: sample_batch(logits, states).read(), bench.scale.steps, bench.scale.rounds
    )
    floor = logits.nbytes / bench.copy_bandwidth
    return {"ms": seconds * 1e3, "floor ms": floor * 1e3}
