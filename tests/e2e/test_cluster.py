"""The same application on a Ray cluster that is already there: two nodes on this machine."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.winnow_process import WinnowServe, environment, winnow
from winnow.local import Winnow
from winnow.request import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPT = "the quick brown fox " * 10
# Without a token, which a machine's first `ray.init` would have to make.
OPEN = {"RAY_AUTH_MODE": "disabled"}


@dataclass
class RayCluster:
    """address: of its control store, for RAY_ADDRESS. dashboard: URL of its REST API."""

    address: str
    dashboard: str

    def get(self, path: str) -> Any:
        response = httpx.get(self.dashboard + path, timeout=20)
        assert response.is_success, response.text
        return response.json()

    def applications(self) -> dict[str, Any]:
        applications: dict[str, Any] = self.get("/api/serve/applications/")["applications"]
        return applications

    def live_actors(self, namespace: str) -> list[str]:
        actors = self.get("/api/v0/actors?detail=true")["data"]["result"]["result"]
        alive = [actor for actor in actors if actor["state"] == "ALIVE"]
        return [actor["name"] for actor in alive if actor["ray_namespace"] == namespace]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    port = free_port()
    log = tmp_path_factory.mktemp("cluster") / "stderr.txt"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.two_nodes", str(port)],
            env=environment(**OPEN),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, log.read_text()
        yield RayCluster(address, f"http://127.0.0.1:{port}")


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


def flags(model: Path, port: int) -> list[str]:
    numbers = ["--port", str(port), "--grpc-port", "null", "--kv-memory-bytes", "64MiB"]
    return ["--model", str(model), *numbers]


def wait_until_ready(url: str, cluster: RayCluster) -> None:
    deadline_s = time.monotonic() + 150
    while not is_ready(url):
        assert time.monotonic() < deadline_s, cluster.applications()
        time.sleep(0.3)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def answer(url: str, model: Path) -> str:
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def serve_command(*arguments: str) -> None:
    """Ray Serve's own command."""
    command = [sys.executable, "-m", "ray.serve.scripts", *arguments]
    subprocess.run(command, check=True, timeout=90, env=environment(**OPEN), cwd="/")


def test_serve_deploy_places_prefill_and_decode_on_different_nodes(
    cluster: RayCluster, model: Path, tmp_path: Path
) -> None:
    port = free_port()
    config = tmp_path / "winnow.yaml"
    config.write_text(winnow("serve", "--print-config", *flags(model, port)).stdout)
    serve_command("deploy", str(config), "-a", cluster.dashboard)
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url, cluster)
    deployments = cluster.applications()["winnow"]["deployments"]
    (prefill,), (decode,) = (deployments[name]["replicas"] for name in ("Prefill", "Decode"))
    assert prefill["node_id"] != decode["node_id"]
    alone = Winnow.load(model, kv_memory_bytes=1 << 26)
    expected = alone.generate(PROMPT, SamplingParams(max_tokens=10, temperature=0)).text
    assert answer(url, model) == expected
    serve_command("shutdown", "-y", "-a", cluster.dashboard)


def test_winnow_serve_joins_a_cluster_and_takes_only_itself_off(
    cluster: RayCluster, model: Path, tmp_path: Path
) -> None:
    arguments = flags(model, free_port())
    service = WinnowServe(tmp_path, arguments, RAY_ADDRESS=cluster.address, **OPEN)
    answer(service.wait_until_ready(), model)
    assert service.press_ctrl_c() == 0
    service.kill()
    assert cluster.applications() == {}
    assert cluster.live_actors("winnow") == []
    assert "SERVE_CONTROLLER_ACTOR" in cluster.live_actors("serve")
