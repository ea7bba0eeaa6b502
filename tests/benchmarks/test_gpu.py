"""The GPU benchmark runs where there is no GPU, so that it runs where there is one."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_device import attention as on_device_attention
from benchmarks.on_device import decode
from benchmarks.on_device.scale import QUICK
from benchmarks.on_device.section import Bench, attempt
from winnow.kernels.gpu import attention

ROOT = Path(__file__).parents[2]
# As `python -m benchmarks.gpu`, and what was imported by it.
_RUN = """
import json, sys
from benchmarks.gpu import main
main()
print(json.dumps(list(sys.modules)))
"""


def test_it_runs_on_a_cpu_without_the_services(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", _RUN, "--device", "cpu", "--quick", "--json", str(out)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several would wait for each other's cores
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert not imported & {"services", "ray", "grpc", "google.protobuf", "fastapi"}
    assert "winnow.tokenizer" not in imported  # needs a newer transformers than the layers do
    sections = {section["section"]: section for section in json.loads(out.read_text())["sections"]}
    assert list(sections) == list(gpu.SECTIONS)
    for section in sections.values():
        assert section["status"] in ("done", "needs CUDA")
        assert {row.get("error", "needs CUDA") for row in section["rows"]} <= {"needs CUDA"}
    for row in sections["kernels"]["rows"]:
        assert row["off"] <= row["limit"], row


def test_a_section_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Bench) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(gpu.SECTIONS, "copy", fail)
    record = gpu.run("copy", Bench(torch.device("cpu"), QUICK, 1.0))
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: out of memory")
    assert (record["rows"], record["figures"]) == ([], [])


def test_a_steps_target_is_for_the_way_that_is_served() -> None:
    ratios = {"recorded": 1.3, decode.SERVED.name: 1.4, "fused, int8, recorded": 1.2}
    rows = [{"way": way, "batch": 32, "of floor": ratio} for way, ratio in ratios.items()]
    (figure,) = decode.figures([*rows, {"way": decode.SERVED.name, "batch": 1, "error": "no"}])
    assert (figure.name, figure.value, figure.at_most) == (
        "decode step at batch 32 (fused, recorded), of its floor",
        1.4,
        1.25,
    )


def test_what_winnow_logs_meanwhile_is_in_the_row() -> None:
    def fall_back() -> dict[str, float]:
        logging.getLogger("winnow.attention").warning("%s fails here", "it")
        return {"ms": 1.0}

    assert attempt({"batch": 1}, fall_back) == {
        "batch": 1,
        "ms": 1.0,
        "log": ["it fails here"],
    }


def test_a_section_has_a_process_of_its_own_that_may_die() -> None:
    assert gpu.run_apart("copy", "cpu", is_quick=True)["status"] == "done"
    record = gpu.run_apart("copy", "cpu", is_quick=True, limit_s=0.01)
    assert (record["status"], record["error"]) == ("failed", "not done in 0.01 s")


def test_the_rows_of_a_section_that_dies_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: Bench) -> None:
        attempt({"batch": 1}, lambda: {"ms": 1.0})
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(gpu.SECTIONS, "copy", die)
    rows = tmp_path / "rows.jsonl"
    record = gpu.run("copy", Bench(torch.device("cpu"), QUICK, 1.0), rows)
    assert record["status"] == "failed"
    assert record["rows"] == [{"batch": 1, "ms": 1.0}]
    with rows.open("a") as file:
        file.write('{"batch": 8, "m')  # the process ends here
    assert gpu._noted(rows) == record["rows"]


def test_no_section_begins_when_the_time_for_all_is_over() -> None:
    options = gpu.parser().parse_args(["--limit-s", "0", "--only", "copy", "decode"])
    errors = {one["section"]: one["error"] for one in gpu.records(options)}
    assert errors == dict.fromkeys(["copy", "decode"], "not begun: --limit-s 0 is over")


def test_what_went_wrong_in_rows_is_said() -> None:
    rows = [{"ms": 1.0}, {"error": "no memory"}, {"error": "no memory"}, {"ms": 1, "log": ["slow"]}]
    record = {"section": "decode", "status": "done", "seconds": 2.5, "rows": rows}
    assert gpu.summary(record).splitlines() == [
        "decode: done (4 rows, 2.5 s)",
        "  2 rows: no memory",
        "  1 rows: slow",
    ]


def test_the_kernel_takes_the_constants_that_are_measured() -> None:
    tried = {}
    for launch in ((32, 8), (128, 2)):
        with on_device_attention._launched_as(attention, launch):
            size = attention.block_size(128, is_int8=False)
            tried[launch] = (size, attention.NUM_WARPS)
    assert all(launch == used for launch, used in tried.items())
    assert (attention.block_size(128), attention.NUM_WARPS) == (64, 4)
