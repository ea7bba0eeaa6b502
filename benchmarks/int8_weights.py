"""Int8 weights beside bfloat16: memory, decode steps and prefill of the same model, in turn.

`int8` is what `quantize: int8` makes of the model when it is loaded. Steps follow 512 entries per
KV head; times are the best of the rounds. Memory is what loading added to that of a process of its
own, without files that are only mapped.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

from benchmarks.cpu_kernels import best_seconds
from benchmarks.decode import our_step
from benchmarks.prefill import UNPRUNED, prefill_by
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from winnow.decoder import DecoderModel
from winnow.models import load_model

KINDS = {"bfloat16": None, "int8": "int8"}
CONTEXT = 512


def load(path: Path, kind: str) -> DecoderModel:
    return load_model(path, dtype="bfloat16", quantize=KINDS[kind])


def loading_mib(path: Path, kind: str) -> tuple[float, float]:
    """Memory that loading added: at its end, and at its highest; of a new process."""
    command = [sys.executable, "-m", "benchmarks.int8_weights", "--load", str(path), kind]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    end, peak = map(float, printed.split())
    return end, peak


def _print_loading(path: Path, kind: str) -> None:
    before, is_loaded = _resident_mib(), Event()
    seen = [before]

    def watch() -> None:
        while not is_loaded.wait(0.002):
            seen.append(_resident_mib())

    watching = Thread(target=watch)
    watching.start()
    model = load(path, kind)
    is_loaded.set()
    watching.join()
    print(_resident_mib() - before, max(seen) - before)
    assert model.shape.num_layers  # it is there until here


def _resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.split("RssAnon:")[1].split()[0]) / 1024


def compare(path: Path, batches: list[int], num_tokens: int, rounds: int) -> Iterator[list[Any]]:
    """Of each measure: its name, and its value for either kind of weights."""
    memory = [loading_mib(path, kind) for kind in KINDS]
    yield ["memory of the weights, MiB", *(end for end, _ in memory)]
    yield ["at most while loading, MiB", *(peak for _, peak in memory)]
    models = [load(path, kind) for kind in KINDS]
    for batch in batches:
        steps = tuple(our_step(model, batch, CONTEXT, rounds + 2) for model in models)
        yield [f"a step of {batch}, ms", *(1e3 * best for best in best_seconds(steps, rounds))]
    prompt = [idx % 30_000 for idx in range(num_tokens)]
    prefills = tuple(_prefill(model, prompt) for model in models)
    best = best_seconds(prefills, max(1, rounds // 8))
    yield [f"prefill of {num_tokens:,} tokens, ms", *(1e3 * seconds for seconds in best)]


def _prefill(model: DecoderModel, prompt: list[int]) -> Callable[[], float]:
    prefill = prefill_by(model, UNPRUNED)
    return lambda: prefill(prompt)


def main() -> None:
    parser = arguments("Int8 weights beside bfloat16.")
    parser.add_argument("--load", nargs=2, help="print what loading this model as this kind takes")
    options = parser.parse_args()
    if options.load:
        _print_loading(Path(options.load[0]), options.load[1])
        return
    batches, num_tokens, rounds = ([1], 512, 8) if options.quick else ([1, 4, 8], 1024, 24)
    with tempfile.TemporaryDirectory() as folder:
        path = model_path("0.5b", Path(folder))
        rows = [
            {"measure": name, "bfloat16": plain, "int8": ours, "ratio": plain / ours}
            for name, plain, ours in compare(path, batches, num_tokens, rounds)
        ]
    show("Weights as int8, 0.5B shape", rows, [__doc__ or ""])
    write_json(options.json, "int8_weights", rows)


if __name__ == "__main__":
    main()
