"""Recorded steps beside the same steps launched one by one: the tokens of both.

On a CPU, where none is recorded, both are launched.
"""

import torch

from benchmarks.on_device.decode import Way
from benchmarks.on_device.model import random_decoder
from benchmarks.on_device.section import Bench, Figure, Result, logged_warnings
from winnow.decoder import DecoderModel

Tokens = dict[str, list[int]]  # of each request


def measure(bench: Bench) -> Result:
    model = random_decoder(bench)
    with logged_warnings() as log:
        launched, recorded = (_tokens(model, bench, is_recorded=kind) for kind in (False, True))
    if log:
        raise RuntimeError("; ".join(log))
    num_alike = {one: _num_alike(launched[one], recorded[one]) for one in launched}
    rows = [{"sequence": one, "tokens alike": alike} for one, alike in num_alike.items()]
    name = f"replayed steps of {bench.scale.replays:,} before a token differs"
    return Result(rows, [Figure(name, min(num_alike.values()), at_least=bench.scale.replays)])


def _tokens(model: DecoderModel, bench: Bench, *, is_recorded: bool) -> Tokens:
    torch.manual_seed(0)  # of the keys and values
    batch, steps = bench.scale.batches[1], bench.scale.replays + 1  # recorded ones come a step late
    way = Way("", in_place=bench.is_cuda, is_recorded=is_recorded)
    step = way.engine_step(model, bench, batch, steps)
    tokens: Tokens = {str(idx): [] for idx in range(batch)}
    for _ in range(steps):
        for output in step():
            tokens[output.request_id] += [token.token_id for token in output.tokens]
    return tokens


def _num_alike(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((idx for idx, (one, other) in pairs if one != other), min(len(first), len(second)))
