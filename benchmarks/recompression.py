"""Recompression benchmark: what `decode_budget` costs a decode step, on the average of many steps.

Each row runs two engines side by side, a step of one and then of the other, from `context` entries
per KV head on. One has a `decode_budget` of as many entries, so it cuts every sequence once in
`recompress_interval` steps, all of them in the same step. The other has no budget. Both read as
many entries. Queries are recorded in the last steps before a cut, as many as the window has.
`ratio` is of the mean step over one interval with a cut, from the medians of the pairs of steps.
Keys are those that the model makes of prose, or random: R-KV compares a key with later ones until
one is like it, and of random ones none is.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import our_step
from benchmarks.methods import prompt_of
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import REAL_MODEL, model_path
from winnow.catalog import RECOMPRESSIONS
from winnow.decoder import DecoderModel
from winnow.engine.prefill import PrefillRun
from winnow.kv import LayerKV
from winnow.models import load_model
from winnow.pruning_settings import PruningSettings, Recompression

INTERVAL = 128  # the default of `recompress_interval`
STEPS = 48  # between two cuts here, so that there are several to measure
ROUNDS = 4


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Added:
    """Seconds of a step without recompression, and what it adds to the three kinds of steps."""

    step: float
    idle: float
    recording: float
    cut: float

    def ratio(self, window_size: int) -> float:
        total = self.idle * (INTERVAL - window_size) + self.recording * window_size + self.cut
        return 1 + total / (self.step * (INTERVAL + 1))


def prompts_of(model: DecoderModel, batch: int, context: int) -> list[list[LayerKV]]:
    """The layers of a different stretch of prose for each sequence, all tokens kept."""
    prose = prompt_of(model, context + batch)
    settings = PruningSettings(method="full", decode_budget=context)
    runs = [
        PrefillRun(model, prose[idx:][:context], settings, is_long=False) for idx in range(batch)
    ]
    return [[layer for layer in _computed(run) if layer is not None] for run in runs]


def _computed(run: PrefillRun) -> Iterator[LayerKV | None]:
    while not run.finished:
        yield run.compute_layer()


def added_by(
    model: DecoderModel,
    batch: int,
    context: int,
    recompression: Recompression,
    prompts: list[list[LayerKV]],
) -> Added:
    without: list[float] = []
    idle: list[float] = []
    recording: list[float] = []
    cuts: list[float] = []
    window_size = recompression.window_size
    for _ in range(ROUNDS):
        plain, own = (
            our_step(model, batch, context, STEPS + 1, settings, prompts=prompts)
            for settings in (Recompression(), recompression)
        )
        pairs = [(seconds_of(plain), seconds_of(own)) for _ in range(STEPS + 1)]
        without += [one for one, _ in pairs]
        *differences, last = (other - one for one, other in pairs)
        idle += differences[:-window_size]
        recording += differences[-window_size:]
        cuts.append(last)
    return Added(*map(median, (without, idle, recording, cuts)))


def compare(
    name: str, path: Path, keys: str, batches: list[int], contexts: list[int]
) -> Iterator[dict[str, Any]]:
    model = load_model(path, dtype="bfloat16")
    for context in contexts:
        for batch in batches:
            prompts = prompts_of(model, batch, context) if keys == "prose" else []
            for method in RECOMPRESSIONS:
                settings = Recompression(context, recompress_interval=STEPS, method=method)
                added = added_by(model, batch, context, settings, prompts)
                yield {
                    "model": name,
                    "keys": keys,
                    "context": context,
                    "batch": batch,
                    "recompression": method,
                    "step ms": added.step * 1e3,
                    "added ms": added.idle * 1e3,
                    "added by recording ms": added.recording * 1e3,
                    "added by a cut ms": added.cut * 1e3,
                    "ratio": added.ratio(settings.window_size),
                }


def main() -> None:
    options = arguments("Step time with recompression against without.").parse_args()
    batches, contexts = ([1], [512]) if options.quick else ([1, 8], [512, 2048])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows += compare("tiny", model_path("tiny", Path(folder)), "prose", batches, contexts)
        if not options.quick:
            half_billion = model_path("0.5b", Path(folder))
            rows += compare("0.5b", half_billion, "random", batches, contexts)
        if REAL_MODEL.exists():
            rows += compare(REAL_MODEL.name, REAL_MODEL, "prose", batches, contexts)
    show("Recompression, bfloat16", rows, [__doc__ or ""])
    write_json(options.json, "recompression", rows)


if __name__ == "__main__":
    main()
