"""`winnow fetch`, and what `winnow serve` says while a model comes."""

import ctypes
import os
import pty
import random
import re
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from services.cli.serve import with_ports
from services.common.settings import Settings
from tests.deadlines import SOON_S
from tests.e2e.winnow_process import MODULE, environment
from tests.hub import Hub, serving

WEIGHTS = random.Random(2).randbytes(1_000_000)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@contextmanager
def running(*arguments: str, **variables: str) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [*MODULE, *arguments],
        env=environment(**variables),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def fetch(hub: Hub, home: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*MODULE, "fetch", "--model", "o/n", *more],
        env=environment(**hub.environment(home)),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=False,
        preexec_fn=drop_override,
    )


def drop_override() -> None:
    """Root loses at the next exec what lets it write any file."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def wait_for_download(hub: Hub) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not hub.started("model.safetensors"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_model_comes_with_its_revision(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("o/n", FILES, "v1")
    done = fetch(hub, tmp_path, "--revision", "v1")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / "hub/models--o--n/snapshots" / commit
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert f"model o/n@v1 is commit {commit}, in {folder}" in done.stderr
    assert "fetched 1 MB of 1 MB (100%)" in done.stderr


def test_a_terminal_gets_a_bar(hub: Hub, tmp_path: Path) -> None:
    hub.add("o/n", FILES)
    hub.pace = 1_000_000
    terminal, their_end = pty.openpty()
    termios.tcsetwinsize(their_end, (24, 100))
    subprocess.run(
        [*MODULE, "fetch", "--model", "o/n"],
        env=environment(**hub.environment(tmp_path)),
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=their_end,
        timeout=SOON_S,
        check=True,
    )
    os.close(their_end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert re.search(r"o/n@main: +\d+%\|.*/1\.00M", shown)


def test_a_missing_model_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"winnow: there is no folder o/n, and {hub.url} has no such model, or it is private"
    )
    assert "Traceback" not in done.stderr


def test_workers_that_start_at_once_share_one_download(hub: Hub, tmp_path: Path) -> None:
    hub.add("o/n", FILES)
    hub.pace = 400_000
    arguments, variables = ("fetch", "--model", "o/n"), hub.environment(tmp_path)
    with running(*arguments, **variables) as one, running(*arguments, **variables) as other:
        outputs = [process.communicate(timeout=60)[0] for process in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0)
    assert outputs[0] == outputs[1]
    assert hub.started("model.safetensors") == [0]


def test_ctrl_c_ends_a_download_which_the_next_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.add("o/n", FILES)
    hub.hang_bytes = 500_000
    with running("fetch", "--model", "o/n", **hub.environment(tmp_path)) as process:
        wait_for_download(hub)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SOON_S)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "winnow: stopped; the same command goes on where it ended"
    assert "Traceback" not in stderr
    hub.hang_bytes = None
    assert fetch(hub, tmp_path).returncode == 0


def test_a_cache_that_cannot_be_written_is_read(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("o/n", FILES)
    assert fetch(hub, tmp_path / "home").returncode == 0
    hub.add("o/n", FILES | {"config.json": b'{"new": 1}'})
    with read_only(tmp_path / "home"):
        done = fetch(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert f"Permission denied; commit {old} of it is used" in done.stderr
    assert done.stdout.strip().endswith(old)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be written, but by root with the capability to."""
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_service_says_that_it_downloads(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("o/n", FILES)
    hub.hang_bytes = 500_000
    found = with_ports(Settings(port=0, grpc_port=None, admin_port=0))
    ports = ("--port", str(found.port), "--admin-port", str(found.admin_port))
    arguments = ("serve", "--model", "o/n", "--grpc-port", "null", *ports)
    with running(*arguments, **hub.environment(tmp_path)) as process:
        wait_for_download(hub)
        answer = httpx.get(f"http://127.0.0.1:{found.port}/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "downloading"})
        details = httpx.get(f"http://127.0.0.1:{found.admin_port}/ready").json()
        assert (details["status"], details["model"]) == ("downloading", "o/n")
        refused = httpx.post(f"http://127.0.0.1:{found.port}/v1/completions", json={})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "downloading"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SOON_S)
    assert f"fetching model o/n@main at commit {commit} from {hub.url}" in stderr
    assert "Traceback" not in stderr
