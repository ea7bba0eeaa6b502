"""`winnow serve` as a user starts it: a process of its own, in another working directory."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.deadlines import SOON_S
from tests.processes import left_alive

ROOT = Path(__file__).parents[2]
STOP_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 180  # `serve` starts a Ray cluster before some models turn out to be unusable
MODULE = (sys.executable, "-m", "winnow_serve")
SCRIPT = (str(Path(sys.executable).with_name("winnow")),)  # of an installed Winnow
FREE_PORTS = ("--port", "0", "--grpc-port", "0", "--admin-port", "0")


def environment(**variables: str) -> dict[str, str]:
    """The developer's own settings do not count; Winnow need not be installed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WINNOW_", "RAY_"))}
    return kept | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | variables


def winnow(
    *arguments: str, program: Sequence[str] = MODULE, cwd: Path = Path("/"), **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end."""
    return subprocess.run(
        [*program, *arguments],
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


class WinnowServe:
    """A service in the foreground of a session of its own, as in a terminal."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        program: Sequence[str] = MODULE,
        cwd: Path = Path("/"),
        **variables: str,
    ) -> None:
        self.stderr = folder / "stderr.txt"
        at_once = ("--drain-notice-s", "0")
        with self.stderr.open("w") as log:
            self.process = subprocess.Popen(
                [*program, "serve", *at_once, *arguments],
                env=environment(**variables),
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._seen: set[psutil.Process] = set()

    def wait_until_ready(self) -> str:
        """The URL of the ready message."""
        assert self.process.stdout is not None
        message = self.process.stdout.readline()
        self._message = message
        found = re.search(r"https?://[\d.]+:\d+", message)
        assert found, f"no ready message but {message!r}\n{self.stderr.read_text()}"
        self.url = found.group()
        return self.url

    def grpc_address(self) -> str:
        """Of the ready message too."""
        found = re.search(r"gRPC on ([\d.]+:\d+)", self._message)
        assert found
        return found.group(1)

    def admin_url(self) -> str:
        """Of the ready message too."""
        found = re.search(r"admin on ([\d.]+:\d+)", self._message)
        assert found
        return f"http://{found.group(1)}"

    def processes(self) -> list[psutil.Process]:
        """All processes of the service; one may end at any time, as Ray's idle workers do."""
        own = psutil.Process(self.process.pid)
        found = [own, *own.children(recursive=True)]
        self._seen.update(found)
        return found

    def press_ctrl_c(self) -> int:
        """What a terminal does: SIGINT to the whole group. Returns the exit code."""
        self.processes()
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)

    def left(self) -> list[psutil.Process]:
        """Processes of the service that still run."""
        return left_alive(self._seen, timeout_s=SOON_S)

    def kill(self) -> None:
        """For a test that failed before it stopped the service."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(STOP_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
