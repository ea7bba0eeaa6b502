"""Recompression benchmark: what `decode_budget` costs a decode step, on the average of many steps.

Each row runs two engines side by side, a step of one and then of the other, from `context` entries
per KV head on. One has a `decode_budget` of as many entries, so it cuts every sequence once in
`recompress_interval` steps, all of them in the same step. The other has no budget. Both read as
many entries. Queries are recorded in the last steps before a cut, as many as the window has.
`ratio` is of the mean step over one interval with a cut, from the medians of the pairs of steps.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode import our_step
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from winnow.catalog import RECOMPRESSIONS
from winnow.decoder import DecoderModel
from winnow.models import load_model
from winnow.pruning_settings import Recompression

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


def added_by(model: DecoderModel, batch: int, context: int, recompression: Recompression) -> Added:
    without: list[float] = []
    idle: list[float] = []
    recording: list[float] = []
    cuts: list[float] = []
    window_size = recompression.window_size
    for _ in range(ROUNDS):
        plain, own = (
            our_step(model, batch, context, STEPS + 1, settings)
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
    name: str, path: Path, batches: list[int], contexts: list[int]
) -> Iterator[dict[str, Any]]:
    model = load_model(path, dtype="bfloat16")
    for context in contexts:
        for batch in batches:
            for method in RECOMPRESSIONS:
                settings = Recompression(context, recompress_interval=STEPS, method=method)
                added = added_by(model, batch, context, settings)
                yield {
                    "model": name,
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
        for name in ("tiny",) if options.quick else ("tiny", "0.5b"):
            rows += compare(name, model_path(name, Path(folder)), batches, contexts)
    show("Recompression, bfloat16", rows, [__doc__ or ""])
    write_json(options.json, "recompression", rows)


if __name__ == "__main__":
    main()
