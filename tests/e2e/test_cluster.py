"""The same application on a Ray cluster that is already there: two nodes on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.e2e.winnow_process import ROOT, WinnowServe, environment, winnow
from winnow.local import Winnow
from winnow.request import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPT = "the quick brown fox " * 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of a cluster whose nodes have room for one worker each."""
    before = dict(os.environ)
    os.environ.update(environment())
    port = free_port()
    cluster = Cluster()
    common = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster.add_node(**common, include_dashboard=True, dashboard_port=port)
    cluster.add_node(**common)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


def flags(model: Path, port: int) -> list[str]:
    numbers = ["--port", str(port), "--grpc-port", "null", "--kv-memory-bytes", "64MiB"]
    return ["--model", str(model), *numbers]


def wait_until_ready(url: str) -> None:
    deadline_s = time.monotonic() + 150
    while not is_ready(url):
        assert time.monotonic() < deadline_s, serve.status()
        time.sleep(0.3)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def nodes_of_replicas() -> dict[str, str]:
    """Deployment → node, one replica each."""
    details = serve.context._get_global_client().get_serve_details()
    deployments = details["applications"]["winnow"]["deployments"]
    return {name: found["replicas"][0]["node_id"] for name, found in deployments.items()}


def answer(url: str, model: Path) -> str:
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_serve_deploy_places_prefill_and_decode_on_different_nodes(
    dashboard: str, model: Path, tmp_path: Path
) -> None:
    port = free_port()
    config = tmp_path / "winnow.yaml"
    config.write_text(winnow("serve", "--print-config", *flags(model, port)).stdout)
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(config), "-a", dashboard]
    subprocess.run(command, check=True, timeout=60, env=environment(), cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url)
    nodes = nodes_of_replicas()
    assert nodes["Prefill"] != nodes["Decode"]
    alone = Winnow.load(model, kv_memory_bytes=1 << 26)
    expected = alone.generate(PROMPT, SamplingParams(max_tokens=10, temperature=0)).text
    assert answer(url, model) == expected


def test_winnow_serve_joins_a_cluster_and_takes_only_itself_off(
    dashboard: str, model: Path, tmp_path: Path
) -> None:
    serve.shutdown()
    address = ray.get_runtime_context().gcs_address
    arguments = flags(model, free_port())
    service = WinnowServe(tmp_path, arguments, RAY_ADDRESS=address)
    answer(service.wait_until_ready(), model)
    assert service.press_ctrl_c() == 0
    service.kill()
    assert serve.status().applications == {}
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    actors = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor for actor in actors if actor["namespace"] == "winnow"]
