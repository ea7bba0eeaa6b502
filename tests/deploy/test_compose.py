"""What Compose would start works: the same commands and settings, run as plain processes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.deploy.test_prometheus import Prometheus
from tests.e2e.winnow_process import ROOT, environment

COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile.winnow"
OURS = ("gateway", "decode-1", "decode-2")
START_TIMEOUT_S = 90


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """As Compose itself reads the file."""
    done = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE), "config"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout)["services"])


def test_every_service_is_checked_restarted_and_confined(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        assert "no-new-privileges:true" in service["security_opt"]
    for name in OURS:
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]


def test_ports_are_open_to_this_machine_alone(services: dict[str, Any]) -> None:
    published = [str(port) for service in services.values() for port in service.get("ports", ())]
    assert len(published) == 4
    assert all("127.0.0.1" in port for port in published)


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint is not None
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_without_rights_and_build_tools() -> None:
    build, final = DOCKERFILE.read_text().split("\nFROM ")[1:]
    assert "pip install" in build
    assert "pip" not in final
    assert "USER 10001:10001" in final
    assert "HEALTHCHECK" in final


def test_the_image_has_what_it_copies_and_may_copy_it() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.M):
        for source in line.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


class Stack:
    """The Compose services as processes; ports and host names are this machine's."""

    def __init__(self, services: dict[str, Any], folder: Path) -> None:
        self._services = services
        self._folder = folder
        self._entrypoint = self._read_entrypoint()
        self.ports = {"redis": free_port()}
        self.processes: list[subprocess.Popen[str]] = []

    def _read_entrypoint(self) -> list[str]:
        (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE.read_text(), re.M)
        program, *arguments = json.loads(entrypoint)
        assert program == "python"
        return [sys.executable, *arguments]

    def start_redis(self) -> None:
        command = [*self._services["redis"]["command"], "--port", str(self.ports["redis"])]
        self._start("redis", command, {})

    def start(self, name: str) -> None:
        service = self._services[name]
        self._start(name, [*self._entrypoint, *service["command"]], self._variables(name, service))

    def _variables(self, name: str, service: dict[str, Any]) -> dict[str, str]:
        variables = {k: str(v) for k, v in service["environment"].items()}
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
        with (self._folder / f"{name}.txt").open("w") as log:
            process = subprocess.Popen(
                command,
                env=environment(**variables),
                cwd="/tmp",
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)

    def healthy(self, name: str) -> bool:
        """What Compose would find when it runs the service's own check."""
        _, program, *arguments = self._services[name]["healthcheck"]["test"]
        assert program == "python"
        *arguments, target = arguments
        variable = "WINNOW_PORT" if name == "gateway" else "WINNOW_DECODE_PORT"
        asked = str(self._services[name]["environment"][variable])
        target = target.replace(asked, str(self.ports[f"{name} {variable}"]))
        command = [sys.executable, *arguments, target]
        done = subprocess.run(command, env=environment(), cwd="/tmp", timeout=60, check=False)
        return done.returncode == 0

    def stop(self) -> None:
        left = [psutil.Process(p.pid) for p in self.processes if p.poll() is None]
        everyone = left + [child for process in left for child in process.children(recursive=True)]
        for process in left:
            process.terminate()
        _, alive = psutil.wait_procs(everyone, timeout=40)
        for process in alive:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def stack(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(services, tmp_path_factory.mktemp("compose"))
    try:
        stack.start_redis()
        for name in OURS:
            stack.start(name)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not all(map(stack.healthy, OURS)):
            assert time.monotonic() < deadline_s, "the services do not become healthy"
        yield stack
    finally:
        stack.stop()


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_the_stack_answers_and_is_scraped(stack: Stack, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{stack.ports['gateway WINNOW_PORT']}"
    prompt = (ROOT / "examples/long_prompt.txt").read_text()
    body = {"model": "winnow-tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"].strip()
    assert answer["usage"]["winnow"]["kv_bytes_kept"] < answer["usage"]["winnow"]["kv_bytes_full"]
    prometheus = Prometheus(tmp_path, f"{url}/metrics/targets")
    try:
        deadline_s = time.monotonic() + 30
        while len(prometheus_roles(prometheus)) < 4:
            assert time.monotonic() < deadline_s, prometheus_roles(prometheus)
            time.sleep(0.5)
        assert prometheus_roles(prometheus) == ["decode", "decode", "gateway", "prefill"]
    finally:
        prometheus.stop()


def prometheus_roles(prometheus: Prometheus) -> list[str]:
    try:
        found = prometheus.get("query", query="winnow_build_info")["result"]
    except httpx.TransportError:
        return []
    return sorted(info["metric"]["role"] for info in found)


@pytest.mark.e2e
def test_a_service_that_is_away_is_unhealthy() -> None:
    for target in (f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}/ready"):
        command = [sys.executable, "-m", "services.cli", "health", target]
        done = subprocess.run(
            command, env=environment(), cwd="/tmp", capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert f"{target} does not answer" in done.stderr
