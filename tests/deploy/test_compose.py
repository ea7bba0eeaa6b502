"""What Compose would start works: the same commands and settings, run as plain processes."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.common.ports import free_port
from tests.deadlines import SOON_S
from tests.deploy.prometheus import Prometheus
from tests.deploy.stack import DOCKERFILE, OURS, Stack
from tests.e2e.winnow_process import ROOT, winnow


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
    build, cpu, _, final = DOCKERFILE.read_text().split("\nFROM ")[1:]
    assert "pip install" in build
    for runtime in (cpu, final):
        assert "pip" not in runtime
        assert "apt-get" not in runtime
    assert "USER 10001:10001" in final
    assert "HEALTHCHECK" in final


def test_the_image_for_gpus_alone_has_the_compiler_that_triton_calls() -> None:
    """And the headers of the C library; those of Python are there, of CUDA in Triton's wheel."""
    *_, cuda, final = DOCKERFILE.read_text().split("\nFROM ")
    assert final.startswith("runtime-${DEVICE}\n")
    assert cuda.startswith("${PYTHON_IMAGE} AS runtime-cuda\n")
    assert re.search(r"apt-get install .* gcc libc6-dev ", cuda)


def test_the_image_has_what_it_copies_and_may_copy_it() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.M):
        for source in line.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_the_stack_answers_and_is_scraped(stack: Stack, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{stack.ports['gateway WINNOW_PORT']}"
    prompt = (ROOT / "examples/long_prompt.txt").read_text()
    body = {"model": "winnow-tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"].strip()
    assert answer["usage"]["winnow"]["kv_bytes_kept"] < answer["usage"]["winnow"]["kv_bytes_full"]
    admin_url = f"http://127.0.0.1:{stack.ports['gateway WINNOW_ADMIN_PORT']}"
    prometheus = Prometheus(tmp_path, f"{admin_url}/metrics/targets")
    try:
        deadline_s = time.monotonic() + SOON_S
        while len(prometheus_roles(prometheus)) < 4:
            assert time.monotonic() < deadline_s, prometheus_roles(prometheus)
            time.sleep(0.5)
        assert prometheus_roles(prometheus) == ["decode", "decode", "gateway", "prefill"]
    finally:
        prometheus.stop()


def prometheus_roles(prometheus: Prometheus) -> list[str]:
    found = prometheus.get("query", query="winnow_build_info")["result"]
    return sorted(info["metric"]["role"] for info in found)


@pytest.mark.e2e
def test_a_service_that_is_away_is_unhealthy() -> None:
    for target in (f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}/ready"):
        done = winnow("health", target)
        assert done.returncode == 2
        assert f"{target} does not answer" in done.stderr
