"""Prefill benchmark: time and peak memory by prompt length, against transformers.

Contestants: `transformers` (its forward pass with a KV cache and logits of the last token, as
`generate` prefills), and our layer loop with methods `full`, `fastkv` and `asl`, which select at
half depth (ASL by `latest_layer`, so its time includes watching the ranks). Each contestant runs in
its own process, in turn, so that their memory is measured apart.

The floor of a pruned run is the share of layer-tokens that it computes. Attention shrinks faster
than that, so a run can be below the floor.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import arguments, show, write_json
from benchmarks.shapes import model_path
from winnow.decoder import DecoderModel
from winnow.defaults import scaled_defaults
from winnow.engine.prefill import PrefillRun
from winnow.kv import ModelShape
from winnow.pruning_settings import PruningSettings

THEIRS, UNPRUNED = "transformers", "full"
CONTESTANTS = (THEIRS, UNPRUNED, "fastkv", "asl")
SELECT_SHARE = 8  # one in eight tokens is selected


def settings_for(contestant: str, shape: ModelShape, num_tokens: int) -> PruningSettings:
    """Select an eighth of the tokens at half depth, with a KV budget of the same size."""
    budget = max(64, num_tokens // SELECT_SHARE)
    half = shape.num_layers // 2 - 1
    base = scaled_defaults(shape)
    if contestant == UNPRUNED:
        return replace(base, method=UNPRUNED)
    pruned = replace(base, select_tokens=budget, kv_budget=budget)
    if contestant == "fastkv":
        return replace(pruned, method="fastkv", fixed_layer=half)
    return replace(pruned, method="asl", threshold=0.0, latest_layer=half)


def transformers_prefill(path: Path) -> Callable[[list[int]], float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)  # in eval mode

    @torch.inference_mode()
    def prefill(token_ids: list[int]) -> float:
        output = model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
        return float(output.logits[0, -1, 0])

    return prefill


def our_prefill(path: Path, contestant: str) -> Callable[[list[int]], float]:
    from winnow.models import load_model  # noqa: PLC0415 - benchmarks.gpu runs without its imports

    return prefill_by(load_model(path, dtype="bfloat16"), contestant)


def prefill_by(model: DecoderModel, contestant: str) -> Callable[[list[int]], float]:
    def prefill(token_ids: list[int]) -> float:
        settings = settings_for(contestant, model.shape, len(token_ids))
        run = PrefillRun(
            model, token_ids, settings, is_long=model.description.is_long(len(token_ids))
        )
        while not run.finished:
            run.compute_layer()  # its KV is dropped here; the service sends it to decode
        return float(model.logits(run.result().final_hidden[None])[0, 0])

    return prefill


def measure(path: Path, contestant: str, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Measure in this process: seconds of each round, and peak bytes above the loaded weights."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 1000, (num_tokens,), generator=generator).tolist()
    ours = contestant != THEIRS
    prefill = our_prefill(path, contestant) if ours else transformers_prefill(path)
    prefill(token_ids[:256])  # touches every weight
    gc.collect()
    loaded = reset_peak()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        prefill(token_ids)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak_bytes": memory_bytes("VmHWM") - loaded}


def reset_peak() -> int:
    """Reset the kernel's peak RSS of this process; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_apart(path: Path, contestant: str, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.prefill", "--child", str(path), contestant]
    result = subprocess.run(
        [*command, str(num_tokens), str(rounds)], check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def floor_of(contestant: str, num_layers: int, num_tokens: int) -> float:
    """Share of the layer-tokens of an unpruned prompt that the contestant computes."""
    if contestant in (THEIRS, UNPRUNED):
        return 1.0
    kept = max(64, num_tokens // SELECT_SHARE)
    half = num_layers // 2
    return (half + (num_layers - half) * kept / num_tokens) / num_layers


def compare(
    name: str, path: Path, num_layers: int, num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of all contestants at one length, measured in turn in each round."""
    seconds: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    peaks = dict.fromkeys(CONTESTANTS, 0)
    for _ in range(rounds):
        for contestant in CONTESTANTS:
            result = measure_apart(path, contestant, num_tokens, rounds=2)
            seconds[contestant].append(min(result["seconds"]))
            peaks[contestant] = max(peaks[contestant], result["peak_bytes"])
    unpruned, theirs = median(seconds[UNPRUNED]), median(seconds[THEIRS])
    return [
        {
            "model": name,
            "tokens": num_tokens,
            "contestant": contestant,
            "seconds": median(seconds[contestant]),
            "of unpruned": median(seconds[contestant]) / unpruned,
            "floor": floor_of(contestant, num_layers, num_tokens),
            "of transformers": median(seconds[contestant]) / theirs,
            "peak MB": peaks[contestant] / 2**20,
            "peak of transformers": peaks[contestant] / peaks[THEIRS],
        }
        for contestant in CONTESTANTS
    ]


def main() -> None:
    parser = arguments("Prefill time and peak memory beside transformers.")
    parser.add_argument("--child", nargs=4, metavar=("PATH", "NAME", "TOKENS", "ROUNDS"))
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths of the 0.5b model")
    parser.add_argument("--rounds", type=int, help="processes per contestant (default: 3)")
    options = parser.parse_args()
    if options.child:
        path, contestant, num_tokens, rounds = options.child
        print(json.dumps(measure(Path(path), contestant, int(num_tokens), int(rounds))))
        return
    rounds = options.rounds or (1 if options.quick else 3)
    half_billion = options.lengths or ([2048] if options.quick else [2048, 8192, 16000])
    plan = [("0.5b", 24, half_billion), ("tiny", 12, [1024] if options.quick else [1024, 4096])]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, num_layers, lengths in plan:
            path = model_path(name, Path(folder))
            for num_tokens in lengths:
                rows += compare(name, path, num_layers, num_tokens, rounds)
    show("Prefill, bfloat16", rows, [__doc__ or ""])
    write_json(options.json, "prefill", rows)


if __name__ == "__main__":
    main()
