"""GPU benchmark: kernels, decode steps and prefill beside what the device's memory allows.

    python -m benchmarks.gpu [--device cuda] [--quick] [--json out.json]

Under ten minutes on a GPU, with random weights made there. It needs neither the services nor Ray.
Each section runs in a process of its own: one that fails, or takes more than LIMIT_S, is recorded
with its error and the rows that it has until then, and the rest runs. With `--device cpu --quick`
everything is tiny and kernels are their PyTorch references; that tests the script, and says nothing
about speed.

The floor of a decode step is the time to read the weights and every sequence's keys and values
once, at the bandwidth of a copy measured in the same run.
"""

import gc
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_device import (
    attention,
    ceiling,
    decode,
    kernels,
    prefill,
    recompression,
    recording,
    sampler,
    shipping,
)
from benchmarks.on_device.scale import FULL, QUICK
from benchmarks.on_device.section import Bench, NeedsCuda, Result, Section, noting, reason
from benchmarks.report import arguments, show

SECTIONS: dict[str, Section] = {
    "copy": ceiling.measure,
    "kernels": kernels.measure,
    "attention": attention.measure,
    "sampler": sampler.measure,
    "decode": decode.measure,
    "recording": recording.measure,
    "recompression": recompression.measure,
    "prefill": prefill.measure,
    "shipping": shipping.measure,
}

LIMIT_S = 200
TOTAL_LIMIT_S = 570


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    found: dict[str, Any] = {"device": str(device), "python": platform.python_version()}
    for package in ("torch", "transformers", "triton"):
        found[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory}
        found |= {
            "capability": torch.cuda.get_device_capability(device),
            "cuda": torch.version.cuda,
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(name: str, bench: Bench, rows: Path | None = None) -> dict[str, Any]:
    """The section's record: its outcome, rows, and its rows of the short table.

    rows: a file that gets each of them as it is measured, a line of JSON.
    """
    start = time.perf_counter()
    measured: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        measured.append(row)
        if rows is not None:
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")

    result, outcome = Result(measured), {"status": "done"}
    try:
        with noting(note):
            result = SECTIONS[name](bench)
    except NeedsCuda as error:
        outcome = {"status": str(error)}
    except Exception as error:  # the other sections still count
        outcome = {"status": "failed", "error": reason(error)}
    _free(bench)
    return {
        "section": name,
        **outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "copy_bandwidth": bench.copy_bandwidth,
        "rows": list(result.rows),
        "figures": [figure.row(is_cuda=bench.is_cuda) for figure in result.figures],
    }


def _free(bench: Bench) -> None:
    gc.collect()
    if bench.is_cuda:
        torch.cuda.empty_cache()


def run_apart(
    name: str, device: str, *, is_quick: bool, limit_s: float = LIMIT_S
) -> dict[str, Any]:
    """The record of a section that runs in a process of its own, for `limit_s` at most.

    After some errors a process cannot use its GPU again, and a kernel may never end.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, rows = Path(folder) / "out.json", Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", "--together", "--only", name]
        command += ["--device", device, "--json", str(out), "--rows", str(rows)]
        command += ["--quick"] if is_quick else []
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit_s, check=False
            )
            last_line = done.stderr.strip().rpartition("\n")[2]
            error = f"exit code {done.returncode}: {last_line}"
        except subprocess.TimeoutExpired:
            error = f"not done in {limit_s:.3g} s"
        seconds = round(time.perf_counter() - start, 1)
        if out.exists():
            record: dict[str, Any] = json.loads(out.read_text())["sections"][0]
            return record
        return _failed(name, error, seconds, _noted(rows))


def _failed(
    name: str, error: str, seconds: float = 0.0, rows: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    failed = {"section": name, "status": "failed", "error": error, "seconds": seconds}
    return failed | {"rows": list(rows), "figures": []}


def _noted(rows: Path) -> list[dict[str, Any]]:
    """The rows that a process wrote before it ended, perhaps in the middle of one."""
    text = rows.read_text() if rows.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def parser() -> ArgumentParser:
    options = arguments("Kernels, decode and prefill on a GPU, against its memory's bandwidth.")
    options.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="torch device (default: cuda)"
    )
    options.add_argument("--only", nargs="+", choices=SECTIONS, help="run these sections alone")
    options.add_argument(
        "--together",
        action="store_true",
        help="run all sections in this process, as on a CPU (default: each in its own)",
    )
    options.add_argument(
        "--limit-s",
        type=float,
        default=TOTAL_LIMIT_S,
        help="seconds for all sections that have a process each (default: %(default)s)",
    )
    options.add_argument("--rows", type=Path, help="write each row to this file as it comes")
    return options


def records(options: Namespace) -> Iterator[dict[str, Any]]:
    """Run the sections, one after the other."""
    names, device = options.only or SECTIONS, torch.device(options.device)
    if device.type == "cuda" and not options.together:
        yield from _records_apart(names, options)
        return
    scale = QUICK if options.quick else FULL
    torch.manual_seed(0)
    bench = Bench(device, scale, ceiling.copy_bandwidth(device, scale.copy_bytes))
    for name in names:
        yield run(name, bench, options.rows)


def _records_apart(names: Iterable[str], options: Namespace) -> Iterator[dict[str, Any]]:
    end_s = time.monotonic() + options.limit_s
    for name in names:
        left_s = end_s - time.monotonic()
        if left_s < 1:
            yield _failed(name, f"not begun: --limit-s {options.limit_s:g} is over")
            continue
        limit_s = min(LIMIT_S, left_s)
        yield run_apart(name, options.device, is_quick=options.quick, limit_s=limit_s)


def measure(options: Namespace) -> list[dict[str, Any]]:
    """Run the sections; returns the short table. The JSON is written after each of them."""
    content = {"benchmark": "gpu", "machine": machine(torch.device(options.device))}
    sections: list[dict[str, Any]] = []
    for record in records(options):
        sections.append(record)
        print(summary(record), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(content | {"sections": sections}, indent=1))
    return [figure for record in sections for figure in record["figures"]]


def summary(record: dict[str, Any]) -> str:
    """A line that says how the section went, and a line each for what went wrong in its rows."""
    rows = record["rows"]
    ended = ": ".join(record[key] for key in ("status", "error") if key in record)
    counts = Counter(row["error"] for row in rows if "error" in row)
    counts.update(line for row in rows for line in dict.fromkeys(row.get("log", ())))
    lines = [f"{record['section']}: {ended} ({len(rows)} rows, {record['seconds']} s)"]
    return "\n".join(lines + [f"  {count} rows: {what}" for what, count in counts.items()])


def main() -> None:
    options = parser().parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser().error("no CUDA device here; --device cpu --quick tests the script")
    gc.freeze()  # what is imported is not looked through again after each row
    try:
        if table := measure(options):
            show(f"Figures on {options.device}", table)
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    main()
