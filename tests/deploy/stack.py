"""The Compose services as plain processes: the same commands and settings."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from services.common.ports import free_port
from tests.e2e.winnow_process import MODULE, ROOT, environment
from tests.processes import left_alive

COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile.winnow"
OURS = ("gateway", "decode-1", "decode-2")
START_TIMEOUT_S = 300


def compose_services() -> dict[str, Any]:
    """The services as Compose itself reads the file."""
    done = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE), "config"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout)["services"])


class Stack:
    """The Compose services as processes; ports and host names are this machine's."""

    def __init__(self, services: dict[str, Any], folder: Path, **changes: str) -> None:
        """`changes` are environment variables over what Compose sets."""
        self._changes = changes
        self._services = services
        self._folder = folder
        self._entrypoint = self._read_entrypoint()
        self.ports = {"redis": free_port()}
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def _read_entrypoint(self) -> list[str]:
        (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE.read_text(), re.M)
        program, *arguments = json.loads(entrypoint)
        assert program == "winnow"
        return [*MODULE, *arguments]

    def start_redis(self) -> None:
        command = [*self._services["redis"]["command"], "--port", str(self.ports["redis"])]
        self._start("redis", command, {})

    def start_all(self) -> None:
        """Redis and all of ours; returns when they are healthy."""
        self.start_redis()
        for name in OURS:
            self.start(name)
        self.wait_until_healthy(*OURS)

    def start(self, name: str) -> None:
        service = self._services[name]
        self._start(name, [*self._entrypoint, *service["command"]], self._variables(name, service))

    def _variables(self, name: str, service: dict[str, Any]) -> dict[str, str]:
        variables = {k: str(v) for k, v in service["environment"].items()} | self._changes
        for variable in [v for v in variables if v.endswith("_PORT")]:
            self.ports[f"{name} {variable}"] = port = free_port()
            variables[variable] = str(port)
        redis_url = variables["WINNOW_REDIS_URL"]
        variables["WINNOW_REDIS_URL"] = redis_url.replace(
            "redis:6379", f"127.0.0.1:{self.ports['redis']}"
        )
        if "WINNOW_DECODE_ADVERTISED_HOST" in variables:
            assert variables["WINNOW_DECODE_ADVERTISED_HOST"] == name  # Compose's own names
            variables["WINNOW_DECODE_ADVERTISED_HOST"] = "127.0.0.1"
        return variables

    def _start(self, name: str, command: list[str], variables: dict[str, str]) -> None:
        with self.log(name).open("a") as log:
            process = subprocess.Popen(
                command,
                env=environment(**variables),
                cwd="/tmp",
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.processes[name] = process

    def log(self, name: str) -> Path:
        """Where a service's output goes."""
        return self._folder / f"{name}.txt"

    def copy(self, name: str, to: str) -> None:
        """One more service like `name`, with ports of its own."""
        self._services = self._services | {to: self._services[name]}

    def restart(self, name: str) -> int:
        """As Compose: SIGTERM, wait, start again. Returns the exit code."""
        self.processes[name].send_signal(signal.SIGTERM)
        code = self.processes[name].wait(START_TIMEOUT_S)
        self.start(name)
        self.wait_until_healthy(name)
        return code

    def wait_until_healthy(self, *names: str) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not all(map(self.healthy, names)):
            assert time.monotonic() < deadline_s, "the services do not become healthy"

    def healthy(self, name: str) -> bool:
        """What Compose would find when it runs the service's own check."""
        _, program, *arguments = self._services[name]["healthcheck"]["test"]
        assert program == "winnow"
        *arguments, target = arguments
        variable = "WINNOW_PORT" if name.startswith("gateway") else "WINNOW_DECODE_PORT"
        asked = str(self._services[name]["environment"][variable])
        target = target.replace(asked, str(self.ports[f"{name} {variable}"]))
        command = [*MODULE, *arguments, target]
        done = subprocess.run(command, env=environment(), cwd="/tmp", timeout=60, check=False)
        return done.returncode == 0

    def stop(self) -> None:
        running = self.processes.values()
        left = [psutil.Process(p.pid) for p in running if p.poll() is None]
        everyone = left + [child for process in left for child in process.children(recursive=True)]
        for process in left:
            process.terminate()
        for process in left_alive(everyone, timeout_s=40):
            process.kill()
        for started in running:
            started.wait()
