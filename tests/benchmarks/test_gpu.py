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
from benchmarks.on_device import decode
from benchmarks.on_device.scale import QUICK
from benchmarks.on_device.section import Bench, attempt

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


def test_a_section_has_a_process_of_its_own_that_may_die(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.run_apart("copy", "cpu", is_quick=True)["status"] == "done"
    monkeypatch.setattr(gpu, "LIMIT_S", 0.01)
    record = gpu.run_apart("copy", "cpu", is_quick=True)
    assert (record["status"], record["error"]) == ("failed", "not done in 0.01 s")
