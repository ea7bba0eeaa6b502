"""Ctrl-C at every moment of a command, and where Python loses it."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

import psutil
import pytest
from safetensors.torch import load_file, save_file

from services.cli.signals import Interrupts, StopSignals
from tests.deadlines import SOON_S
from tests.e2e.winnow_process import ROOT, environment
from tests.models_in_code import save_tiny_model

LOSES_IT = """
while True:
    try:
        time.sleep(0.01)
    except:  # as libraries have it around what they import
        pass
"""
TELLS_THAT_IT_LOST_IT = """
try:
    print("begun", flush=True)
    time.sleep(600)
except:
    print("lost", flush=True)
    time.sleep(600)
"""
IN_A_FINALISER = """
class Finalised:
    def __del__(self):
        time.sleep(0.01)
while True:
    Finalised()
"""
WAITS_FOR_A_THREAD = """
with ThreadPoolExecutor(1) as pool:
    pool.submit(time.sleep, 60)
"""
IN_A_STRING = """
while True:
    exec("for _ in range(1000): pass")
"""
MAKES_ANOTHER_ERROR_OF_IT = """
try:
    while True:
        time.sleep(0.01)
except BaseException as error:  # as modules in C do that import numpy's
    raise ImportError("core.multiarray failed to import") from error
"""
PROGRAM = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from services.cli import signals
signals._GRACE_S = {grace_s}
with signals.Interrupts() as interrupts:
    interrupts.farewell = "as you wish"
    try:
        print("ready", flush=True)
{body}
    except KeyboardInterrupt:
        interrupts.end_process()
"""


def run(body: str, *, ignored: bool = False, grace_s: float = 0.5) -> "subprocess.Popen[str]":
    """A process that does this; `ignored`: started as a script starts one in the background.

    grace_s: after which it ends by itself.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=indent(body, " " * 8), grace_s=grace_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if before is not None:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end_of(process: "subprocess.Popen[str]") -> str:
    """What it said to SIGINT, of which it died in time."""
    _, errors = process.communicate(timeout=SOON_S)
    assert process.returncode == 130, errors
    return errors


@pytest.mark.parametrize(
    "body",
    [LOSES_IT, IN_A_FINALISER, WAITS_FOR_A_THREAD, IN_A_STRING, MAKES_ANOTHER_ERROR_OF_IT],
)
def test_sigint_ends_a_program_that_loses_it(body: str) -> None:
    process = run(body)
    process.send_signal(signal.SIGINT)
    assert end_of(process).endswith("winnow: as you wish\n")


def test_a_second_sigint_ends_it_at_once() -> None:
    process = run(TELLS_THAT_IT_LOST_IT, grace_s=10 * SOON_S)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "lost\n"
    process.send_signal(signal.SIGINT)
    assert end_of(process) == "winnow: as you wish\n"


def test_it_listens_in_the_background_of_a_script_too() -> None:
    process = run(IN_A_STRING, ignored=True)
    process.send_signal(signal.SIGINT)
    assert end_of(process) == "winnow: as you wish\n"


def test_afterwards_sigint_does_what_it_did_before() -> None:
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    deadline = time.monotonic() + SOON_S
    while threading.active_count() > threads:
        assert time.monotonic() < deadline


def test_a_signal_to_a_service_is_noted_and_raised_where_it_asks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        signals.wait()
        with pytest.raises(KeyboardInterrupt):
            signals.check()
        assert signals.number == signal.SIGTERM
        signals.raise_next()
        for number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        signals.ignore()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_ends_a_services_wait() -> None:
    with StopSignals() as signals:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        started_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            signals.check(60)
        assert time.monotonic() - started_s < SOON_S


COMMANDS = {
    "generate": ("--max-tokens", "7000"),
    "explain": ("--max-tokens", "7000"),
    "eval": ("--tasks", "passkey", "--length", "1k", "--samples", "4000", "--methods", "full"),
}


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose answers take longer than any of the moments below, for it never says its end."""
    folder = save_tiny_model(tmp_path_factory.mktemp("slow"), num_hidden_layers=32)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0] = 0  # of the end token; one of the others is always above
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def start(command: str, model: Path, folder: Path) -> "subprocess.Popen[str]":
    prompt = () if command == "eval" else ("--prompt", "the quick brown fox " * 40)
    output = {
        "generate": (),
        "explain": ("-o", str(folder / "page.html")),
        "eval": ("-o", str(folder)),
    }
    program = (sys.executable, "-m", "winnow_serve", command)
    process = subprocess.Popen(
        [*program, "--model", str(model), *prompt, *COMMANDS[command], *output[command]],
        cwd=ROOT,
        env=environment(HF_HUB_OFFLINE="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while psutil.Process(process.pid).num_threads() == 1:  # Python itself still starts
        assert process.poll() is None
    return process


@pytest.mark.e2e
@pytest.mark.parametrize("moment_s", [0, 0.3, 1, 2, 4, 7])
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_a_command_at_any_moment(
    command: str, moment_s: float, slow_model: Path, tmp_path: Path
) -> None:
    process = start(command, slow_model, tmp_path)
    time.sleep(moment_s)
    process.send_signal(signal.SIGINT)
    errors = end_of(process)
    assert errors.splitlines()[-1].startswith("winnow: stopped")
    if (tmp_path / "settings.json").exists():  # an evaluation has begun
        assert f"the same command goes on in {tmp_path}" in errors
    assert "Traceback" not in errors or "Exception ignored in" in errors  # Python lost it there
    assert list(tmp_path.glob("*.html")) == []


def test_in_another_thread_it_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)

    def command() -> int:
        with Interrupts():
            return 7

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(command).result(SOON_S) == 7
    assert signal.getsignal(signal.SIGINT) == before
