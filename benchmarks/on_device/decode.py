"""One decode step at several batches: Winnow's ways beside transformers' own forward.

`floor` is the time to read the weights and all keys and values once, at a copy's bandwidth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache

from benchmarks.decode import our_step
from benchmarks.on_device.model import as_decoder, fuse, random_network, step_bytes
from benchmarks.on_device.section import Bench, Figure, Result, attempt, logged_warnings
from benchmarks.on_device.timing import seconds_per_call
from winnow.attention import GatherBackend
from winnow.decoder import DecoderModel
from winnow.engine.graph import recorder_for
from winnow.engine.outputs import StepOutput
from winnow.kv import KvDtype

THEIRS = "transformers"
TARGETS = {1: 1.5, 32: 1.25}  # by batch, of the floor

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run steps of Winnow's engine.

    in_place: the attention kernel reads the pages; otherwise they are gathered.
    is_recorded: as a CUDA graph, which is replayed.
    """

    name: str
    in_place: bool = True
    is_recorded: bool = False
    kv_dtype: KvDtype = "auto"

    def step(self, model: DecoderModel, bench: Bench, batch: int) -> Step:
        """An engine with `batch` sequences; each call is one step."""
        return self.engine_step(model, bench, batch, bench.scale.rounds * bench.scale.steps + 1)

    def engine_step(
        self, model: DecoderModel, bench: Bench, batch: int, num_steps: int
    ) -> Callable[[], list[StepOutput]]:
        """As `step`, for `num_steps` calls."""
        if self.in_place:
            bench.require_cuda()
            return self._step(model, bench, batch, num_steps)
        with patch("winnow.engine.step_runner.decode_backend", lambda pool, _: GatherBackend(pool)):
            return self._step(model, bench, batch, num_steps)

    def _step(
        self, model: DecoderModel, bench: Bench, batch: int, num_steps: int
    ) -> Callable[[], list[StepOutput]]:
        return our_step(
            model,
            batch,
            bench.scale.entries,
            num_steps,
            kv_dtype=self.kv_dtype,
            new_recorder=recorder_for(bench.device) if self.is_recorded else None,
        )


UNFUSED = (
    Way("pages gathered", in_place=False),
    Way("pages in place"),
    Way("recorded", is_recorded=True),
)
SERVED = Way("fused, recorded", is_recorded=True)  # what a decode worker runs on a GPU
FUSED = (
    Way("fused, pages gathered", in_place=False),
    Way("fused, pages in place"),
    SERVED,
    Way("fused, int8 gathered", in_place=False, kv_dtype="int8"),
    Way("fused, int8 in place", kv_dtype="int8"),
    Way("fused, int8, recorded", is_recorded=True, kv_dtype="int8"),
)


def their_step(network: Any, bench: Bench, batch: int) -> Step:  # noqa: ANN401
    """The forward pass of transformers on a batch of equal lengths, greedy."""
    shape = bench.shape
    cache = DynamicCache(config=network.config)
    size = (batch, shape.num_kv_heads, bench.scale.entries, shape.head_dim)
    for layer_idx in range(shape.num_layers):
        keys, values = (torch.randn(size, dtype=shape.dtype, device=bench.device) for _ in range(2))
        cache.update(keys, values, layer_idx)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=bench.device)

    @torch.inference_mode()
    def step() -> object:
        logits = network(tokens, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1).tolist()

    return step


def measure(bench: Bench) -> Result:
    rows = list(_rows(bench))
    return Result(rows, figures(rows))


def figures(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """Of the way that is served alone, at each batch."""
    return [
        Figure(
            f"decode step at batch {row['batch']} ({SERVED.name}), of its floor",
            row["of floor"],
            at_most=TARGETS.get(row["batch"]),
        )
        for row in rows
        if row["way"] == SERVED.name and "of floor" in row
    ]


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The one of transformers first: the network is Winnow's afterwards."""
    network = random_network(bench)
    weight_bytes = step_bytes(network)
    yield from _with(partial(their_step, network), bench, weight_bytes, THEIRS)
    model = as_decoder(network, bench)
    for way in UNFUSED:
        yield from _with(partial(way.step, model), bench, weight_bytes, way.name)
    with logged_warnings() as log:
        is_fused = fuse(network, bench)
    if not is_fused:
        yield {"way": "fused", "batch": None, "error": ", ".join(log)}
        return
    for way in FUSED:
        yield from _with(partial(way.step, model), bench, weight_bytes, way.name, way.kv_dtype)


def _with(
    make: Callable[[Bench, int], Step],
    bench: Bench,
    weight_bytes: int,
    name: str,
    kv_dtype: KvDtype = "auto",
) -> Iterator[dict[str, Any]]:
    shape, entries = bench.shape, bench.scale.entries
    for batch in bench.scale.batches:
        num_entries = batch * entries * shape.num_layers * shape.num_kv_heads
        floor = (weight_bytes + shape.kv_bytes(num_entries, kv_dtype)) / bench.copy_bandwidth
        yield attempt({"way": name, "batch": batch}, partial(_row, make, bench, batch, floor))


def _row(
    make: Callable[[Bench, int], Step], bench: Bench, batch: int, floor: float
) -> dict[str, float]:
    scale = bench.scale
    seconds = seconds_per_call(make(bench, batch), scale.steps, scale.rounds)
    return {
        "entries": scale.entries,
        "step ms": seconds * 1e3,
        "floor ms": floor * 1e3,
        "of floor": seconds / floor,
        "tokens/s": batch / seconds,
    }
