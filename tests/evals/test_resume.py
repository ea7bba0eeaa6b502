"""A run that was killed goes on where it stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.records import SAMPLES_FILE, Record
from tests.e2e.winnow_process import ROOT, environment
from tests.evals.run_records import outcomes, records_in

pytestmark = pytest.mark.timeout(400)

ASKED = (
    *("eval", "--methods", "full,snapkv,asl", "--tasks", "passkey,number_string"),
    *("--length", "768", "--budget", "64", "--samples", "16", "--batch-size", "2"),
    *("--num-threads", "1"),
)
TIMEOUT_S = 100  # for work that takes some seconds on an idle machine
NUM_ANSWERS = 3 * 2 * 16


def start(model: Path, folder: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [*ASKED, *more, "--model", str(model), "-o", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "winnow_serve", *command],
        cwd=ROOT,
        env=environment(HF_HUB_OFFLINE="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_lines(file: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(model: Path, folder: Path) -> list[Record]:
    process = start(model, folder)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors.decode()
    return records_in(folder)


def test_a_killed_run_ends_as_one_that_was_not(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model, folder = tiny_models["llama"], tmp_path / "killed"
    process = start(model, folder)
    wait_for_lines(folder / SAMPLES_FILE, 5)
    process.kill()
    process.communicate()
    begun = (folder / SAMPLES_FILE).read_bytes()
    assert 5 <= begun.count(b"\n") < NUM_ANSWERS
    with (folder / SAMPLES_FILE).open("ab") as file:
        file.write(begun[:50])  # what a kill in the middle of a write leaves
    resumed = finish(model, folder)
    whole = begun[: begun.rfind(b"\n") + 1]
    assert (folder / SAMPLES_FILE).read_bytes().startswith(whole)
    assert len(resumed) == NUM_ANSWERS
    assert outcomes(resumed) == outcomes(finish(model, tmp_path / "whole"))


def test_ctrl_c_says_how_to_go_on(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    process = start(tiny_models["llama"], tmp_path / "run", "--samples", "400")  # runs on for long
    wait_for_lines(tmp_path / "run" / SAMPLES_FILE, 1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert f"stopped; the same command goes on in {tmp_path / 'run'}" in errors.decode()
    # Where Python loses the signal it says so, and the process ends all the same.
    assert b"Traceback" not in errors or b"Exception ignored in" in errors
