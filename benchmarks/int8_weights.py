"""Int8 weights beside bfloat16: memory, decode steps and prefill of the same model, in turn.

`int8` is what `quantize: int8` makes of the model when it is loaded. Steps follow 512 entries per
KV head; products are the CPU kernels', of gate and up, 8 layers in turn. Times are the best of the
rounds. Memory is what loading added to that of a process of its own, without files that are only
mapped.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

from benchmarks.cpu_kernels import HIDDEN, INNER, LAYERS, best_seconds, random
from benchmarks.decode import our_step
from benchmarks.prefill import UNPRUNED, prefill_by
from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from winnow.decoder import DecoderModel
from winnow.kernels.cpu.library import is_usable
from winnow.kernels.cpu.linear import Product, linear, pack
from winnow.models import load_model
from winnow.quantization.int8 import quantized

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
    if is_usable():
        yield from compare_products((1, 6, 8, 24, 32, 64, 256, num_tokens), rounds)
    models = [load(path, kind) for kind in KINDS]
    for batch in batches:
        steps = tuple(our_step(model, batch, CONTEXT, rounds + 2) for model in models)
        yield [f"a step of {batch}, ms", *(1e3 * best for best in best_seconds(steps, rounds))]
    prompt = [idx % 30_000 for idx in range(num_tokens)]
    prefills = tuple(_prefill(model, prompt) for model in models)
    best = best_seconds(prefills, max(1, rounds // 8))
    yield [f"prefill of {num_tokens:,} tokens, ms", *(1e3 * seconds for seconds in best)]


def compare_products(numbers: tuple[int, ...], rounds: int) -> Iterator[list[Any]]:
    """Of the CPU kernels, for each number of rows."""
    plain, ours = products()
    for num_rows in numbers:
        calls = (products_of(plain, num_rows), products_of(ours, num_rows))
        best = best_seconds(calls, max(rounds // 4, 400 // num_rows))
        yield [f"products of {num_rows:,} rows, ms", *(1e3 * seconds for seconds in best)]


def products() -> tuple[list[Product], list[Product]]:
    """A layer's gate and up, for some layers: in bfloat16, and the same as int8."""
    weights = [random(2 * INNER, HIDDEN) for _ in range(LAYERS)]
    pairs = [quantized(weight) for weight in weights]
    ours = [Product(pack(levels), scales=scales) for levels, scales in pairs]
    return [Product(pack(weight)) for weight in weights], ours


def products_of(several: list[Product], num_rows: int) -> Callable[[], None]:
    inputs = random(num_rows, HIDDEN)

    def multiply() -> None:
        for product in several:
            linear(inputs, product, 2 * INNER)

    return multiply


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
