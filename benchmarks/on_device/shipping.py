"""Prefill whose layers go to the host while the next ones compute.

An unpruned prompt's keys and values, the most there is to ship, go through a ring of pinned
buffers on a stream of their own. `exposed` is what that adds to prefill's time; `alone` is the time
of the same transfer with nothing beside it, as a share of prefill's.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.on_device.model import random_decoder
from benchmarks.on_device.section import Bench, Figure, Result, attempt
from benchmarks.on_device.timing import seconds_per_call
from benchmarks.prefill import UNPRUNED, settings_for
from winnow.decoder import DecoderModel
from winnow.engine.outgoing import Outgoing, OutgoingBuffers
from winnow.engine.prefill import PrefillRun
from winnow.kv import LayerKV

_NUM_BUFFERS = 4

Ship = Callable[[LayerKV], None]


class Shipping:
    """Copies layers to the host behind the computation; each waits for the buffer it reuses."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = OutgoingBuffers.of(device, _NUM_BUFFERS)
        self._leaving: deque[Outgoing[LayerKV]] = deque()

    def ship(self, layer: LayerKV) -> None:
        if len(self._leaving) == _NUM_BUFFERS:
            with self._leaving.popleft():
                pass  # sent
        self._leaving.append(self._buffers.copy(layer))


def measure(bench: Bench) -> Result:
    bench.require_cuda()
    model = random_decoder(bench)
    rows = [
        attempt({"tokens": num_tokens}, partial(_row, model, bench, num_tokens))
        for num_tokens in bench.scale.prompts
    ]
    figures = [
        Figure(f"transfer to the host exposed, {row['tokens']:,} tokens", row["exposed"], 0.05)
        for row in rows
        if "exposed" in row
    ]
    return Result(rows, figures)


def _row(model: DecoderModel, bench: Bench, num_tokens: int) -> dict[str, float]:
    token_ids = torch.randint(0, model.vocab_size, (num_tokens,)).tolist()
    shipping, rounds = Shipping(model.device), bench.scale.rounds
    dropped = seconds_per_call(lambda: _prefill(model, token_ids, _drop), 1, rounds)
    shipped = seconds_per_call(lambda: _prefill(model, token_ids, shipping.ship), 1, rounds)
    layers: list[LayerKV] = []
    _prefill(model, token_ids, layers.append)
    alone = seconds_per_call(lambda: [*map(shipping.ship, layers)], 1, rounds)
    return {
        "dropped s": dropped,
        "shipped s": shipped,
        "exposed": shipped / dropped - 1,
        "alone": alone / dropped,
    }


def _drop(_: LayerKV) -> None:
    """What prefill alone does with a layer."""


def _prefill(model: DecoderModel, token_ids: list[int], ship: Ship) -> None:
    settings = settings_for(UNPRUNED, model.shape, len(token_ids))
    run = PrefillRun(model, token_ids, settings, is_long=model.description.is_long(len(token_ids)))
    for layer in run.layers():
        ship(layer)
