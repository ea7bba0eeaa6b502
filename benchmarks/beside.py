"""Winnow beside OpenVINO in one run: decode steps of one sequence, and prefill.

OpenVINO runs in a process of its own, by a Python that has it (`--openvino-python`, with openvino
and optimum-intel); the same checkpoint is exported to it. Both are loaded all the time and take
turns: some steps of one, the same number of the other. Times are medians over all steps. `times
faster` is the median over turns of their ratio, so that other work on the machine weighs on both
alike; `at best` is the ratio of the quickest ones. The floor of a step is as in benchmarks.decode.

OpenVINO computes in bfloat16, which is faster here than float32, and keeps its KV cache as u8, its
default; ours is bfloat16. Selecting is `asl` as in benchmarks.prefill; OpenVINO prunes nothing.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.decode import our_step, read_bandwidth
from benchmarks.prefill import UNPRUNED, prefill_by
from benchmarks.report import arguments, cpu_kind, show, write_json
from benchmarks.shapes import model_path
from winnow.decoder import DecoderModel
from winnow.models import load_model

PEER = Path(__file__).parent / "peers" / "openvino_model.py"
PROPERTIES = {"INFERENCE_PRECISION_HINT": "bf16"}
STEPS = 8  # of a turn
PAUSE_S = 0.05  # between turns, after which the threads of the last one no longer spin

Turn = Callable[[], list[float]]  # gives the seconds of its steps


class OpenVino:
    """A model in a process of its own; see peers/openvino_model.py."""

    def __init__(self, python: Path, checkpoint: Path, folder: Path) -> None:
        properties = {**PROPERTIES, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        command = [*map(str, (python, PEER, checkpoint, folder)), json.dumps(properties)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version: str = self._answer()

    def __enter__(self) -> "OpenVino":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends where its input does

    def ask(self, command: str, count: int) -> list[float]:
        assert self._process.stdin is not None
        print(command, count, file=self._process.stdin, flush=True)
        return self._answer()  # type: ignore[no-any-return]

    def _answer(self) -> Any:  # noqa: ANN401
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"OpenVINO's process ended with {self._process.wait()}")
        return json.loads(line)


def take_turns(ours: Turn, theirs: Turn, turns: int) -> dict[str, float]:
    """Columns of a row, in ms."""
    own: list[list[float]] = []
    other: list[list[float]] = []
    for _ in range(turns):
        for turn, seconds in ((ours, own), (theirs, other)):
            seconds.append(turn())
            time.sleep(PAUSE_S)
    ratios = [median(them) / median(us) for us, them in zip(own, other, strict=True)]
    own_all, other_all = list(chain(*own)), list(chain(*other))
    return {
        "ours ms": median(own_all) * 1e3,
        "OpenVINO ms": median(other_all) * 1e3,
        "times faster": median(ratios),
        "at best": min(other_all) / min(own_all),
    }


def timed(call: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def decode_row(model: DecoderModel, peer: OpenVino, context: int, turns: int) -> dict[str, Any]:
    step = our_step(model, 1, context, STEPS * (turns + 1))
    peer.ask("prefill", context)
    timed(step, STEPS)
    peer.ask("step", STEPS)
    row = take_turns(lambda: timed(step, STEPS), lambda: peer.ask("step", STEPS), turns)
    weights = sum(one.nbytes for one in model._model.parameters())
    shape = model.shape
    kv_bytes = shape.kv_bytes(context * shape.num_layers * shape.num_kv_heads)
    floor = (weights + kv_bytes) / read_bandwidth() * 1e3
    return {
        "what": f"step after {context:,} entries",
        **row,
        "of the floor": row["ours ms"] / floor,
    }


def prefill_rows(
    model: DecoderModel, peer: OpenVino, num_tokens: int, turns: int
) -> Iterator[dict[str, Any]]:
    token_ids = [idx % 1000 for idx in range(num_tokens)]
    for contestant, name in ((UNPRUNED, "nothing pruned"), ("asl", "selecting")):
        prefill = prefill_by(model, contestant)
        row = take_turns(
            lambda prefill=prefill: timed(lambda: prefill(token_ids), 1),  # type: ignore[misc]
            lambda: peer.ask("prefill", num_tokens),
            turns,
        )
        yield {"what": f"prefill of {num_tokens:,}, {name}", **row, "of the floor": "-"}


def compare(
    name: str, python: Path, folder: Path, lengths: Sequence[int], turns: int
) -> Iterator[dict[str, Any]]:
    checkpoint = model_path(name, folder)
    model = load_model(checkpoint, dtype="bfloat16")
    with OpenVino(python, checkpoint, folder / f"{name}-openvino") as peer:
        print(f"{name}: OpenVINO {peer.version}")
        for context in (512, 2048):
            yield {"model": name, **decode_row(model, peer, context, 5 * turns)}
        for num_tokens in lengths:
            for row in prefill_rows(model, peer, num_tokens, turns):
                yield {"model": name, **row}


def main() -> None:
    parser = arguments("Winnow beside OpenVINO in one run.")
    parser.add_argument("--openvino-python", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--models", nargs="+", choices=("0.5b", "tiny"), default=["0.5b", "tiny"])
    parser.add_argument("--lengths", type=int, nargs="*", help="prompt lengths")
    parser.add_argument("--folder", type=Path, help="keeps the models for the next run")
    options = parser.parse_args()
    turns = 2 if options.quick else 5
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            lengths = {"0.5b": [4096, 8192], "tiny": [1024, 4096]}[name]
            lengths = lengths if options.lengths is None else options.lengths
            python = options.openvino_python.absolute()  # not resolved: a link would lose its venv
            rows += compare(name, python, options.folder or Path(temporary), lengths, turns)
    notes = [__doc__ or "", f"{cpu_kind()}; {torch.get_num_threads()} threads"]
    show("Beside OpenVINO, bfloat16", rows, notes)
    write_json(options.json, "beside", rows)


if __name__ == "__main__":
    main()
