"""The same application on a Ray cluster that is already there: two nodes on this machine."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.common.ports import free_port
from tests.deadlines import SOON_S
from tests.e2e import two_nodes
from tests.e2e.winnow_process import WinnowServe, environment, winnow
from tests.load import NUM_CLIENTS, load
from winnow.local import Winnow
from winnow.sampling_params import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

REPLACE_TIMEOUT_S = 150  # of all replicas, under load
PROMPT = "the quick brown fox " * 10
# As an operator sets them on a cluster's nodes, and for whoever uses it.
ACCESS: dict[str, Any] = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a-token-of-the-cluster-s-own",
}


@dataclass
class RayCluster:
    """address: of its control store, for RAY_ADDRESS. dashboard: URL of its REST API."""

    address: str
    dashboard: str

    def get(self, path: str) -> Any:
        headers = {"authorization": f"Bearer {ACCESS['RAY_AUTH_TOKEN']}"}
        response = httpx.get(self.dashboard + path, timeout=20, headers=headers)
        assert response.is_success, response.text
        return response.json()

    def applications(self) -> dict[str, Any]:
        applications: dict[str, Any] = self.get("/api/serve/applications/")["applications"]
        return applications

    def live_actors(self, namespace: str) -> list[str]:
        actors = self.get("/api/v0/actors?detail=true")["data"]["result"]["result"]
        alive = [actor for actor in actors if actor["state"] == "ALIVE"]
        return [actor["name"] for actor in alive if actor["ray_namespace"] == namespace]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    port = free_port()
    log = tmp_path_factory.mktemp("cluster") / "stderr.txt"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, two_nodes.__file__, str(port)],
            env=environment(PYTHONPATH="", **ACCESS),  # an application says where it imports from
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
    numbers = [
        "--port",
        str(port),
        "--grpc-port",
        "null",
        "--admin-port",
        "null",
        "--kv-memory-bytes",
        "64MiB",
    ]
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
    subprocess.run(command, check=True, timeout=90, env=environment(**ACCESS), cwd="/")


@contextlib.contextmanager
def deployed(arguments: Sequence[str], folder: Path, cluster: RayCluster) -> Iterator[None]:
    """Until the block ends, however it ends: the next test finds an empty cluster."""
    deploy(arguments, folder, cluster)
    try:
        yield
    finally:
        serve_command("shutdown", "-y", "-a", cluster.dashboard)


def deploy(arguments: Sequence[str], folder: Path, cluster: RayCluster) -> None:
    config = folder / "winnow.yaml"
    config.write_text(winnow("serve", "--print-config", *arguments).stdout)
    serve_command("deploy", str(config), "-a", cluster.dashboard)


def replicas(cluster: RayCluster) -> set[str]:
    """The running replicas of every deployment."""
    return {
        replica["replica_id"]
        for deployment in cluster.applications()["winnow"]["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def test_serve_deploy_places_prefill_and_decode_on_different_nodes(
    cluster: RayCluster, model: Path, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with deployed(flags(model, port), tmp_path, cluster):
        wait_until_ready(url, cluster)
        deployments = cluster.applications()["winnow"]["deployments"]
        (prefill,), (decode,) = (deployments[name]["replicas"] for name in ("Prefill", "Decode"))
        assert prefill["node_id"] != decode["node_id"]
        alone = Winnow.load(model, kv_memory_bytes=1 << 26)
        expected = alone.generate(PROMPT, SamplingParams(max_tokens=10, temperature=0)).text
        assert answer(url, model) == expected


def test_a_new_version_is_rolled_out_under_load_and_no_request_fails(
    cluster: RayCluster, model: Path, tmp_path: Path
) -> None:
    port = free_port()
    small = ("--prefill-num-cpus", "0.3", "--decode-num-cpus", "0.3", "--num-threads", "1")
    # What is under way may wait until the only prefill worker's successor has started.
    patient = ("--drain-timeout-s", str(REPLACE_TIMEOUT_S))
    several = (*flags(model, port), *small, *patient, "--decode-workers", "2")
    for name in ("grpc", "admin", "gateway-metrics", "prefill-metrics"):  # the next replica's too
        several += (f"--{name}-port", str(free_port()))
    url = f"http://127.0.0.1:{port}"
    with deployed(several, tmp_path, cluster):
        wait_until_ready(url, cluster)
        before = replicas(cluster)
        with load(f"{url}/v1", PROMPT) as done:
            deploy((*several, "--max-n", "5"), tmp_path, cluster)
            deadline_s = time.monotonic() + REPLACE_TIMEOUT_S
            while before & (after := replicas(cluster)) or len(after) < len(before):
                assert time.monotonic() < deadline_s, cluster.applications()
                time.sleep(0.5)
            answered = done.num_answered
            while done.num_answered < answered + NUM_CLIENTS:
                time.sleep(0.1)


def test_winnow_serve_joins_a_cluster_and_takes_only_itself_off(
    cluster: RayCluster, model: Path, tmp_path: Path
) -> None:
    arguments = flags(model, free_port())
    service = WinnowServe(tmp_path, arguments, RAY_ADDRESS=cluster.address, **ACCESS)
    answer(service.wait_until_ready(), model)
    assert service.press_ctrl_c() == 0
    service.kill()
    deadline_s = time.monotonic() + SOON_S
    while (left := (cluster.applications(), cluster.live_actors("winnow"))) != ({}, []):
        assert time.monotonic() < deadline_s, left  # Ray ends actors some moments later
        time.sleep(0.2)
    assert "SERVE_CONTROLLER_ACTOR" in cluster.live_actors("serve")
