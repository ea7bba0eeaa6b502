"""`winnow serve` as an operator secures it: TLS everywhere, keys, a Redis with a password."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import trustme
from ray.util import get_node_ip_address

from services.common.tls import trusting
from services.gateway.access.keys import entry_text, new_key
from tests.deploy.chart import helm_test_script
from tests.e2e.ray_ports import RAY_CALLS, auth_tokens, code_of, outward_ports
from tests.e2e.winnow_process import WinnowServe, environment, winnow
from tests.guarded_redis import PASSWORD, GuardedRedis
from tests.processes import of_each

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

KEY, KEY_ENTRY = new_key("team")
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@dataclass
class Secured:
    """variables: with which the service was started, and its own tools are."""

    process: WinnowServe
    url: str
    variables: dict[str, Any]


@pytest.fixture(scope="module")
def ray_tls(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ray's own variables. Its processes call each other by address, so the certificate has it."""
    folder = tmp_path_factory.mktemp("ray")
    issued = authority.issue_cert("localhost", "127.0.0.1", get_node_ip_address())
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "cert.pem"),
        "RAY_TLS_SERVER_KEY": str(folder / "key.pem"),
        "RAY_TLS_CA_CERT": str(folder / "ca.pem"),
    }


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen2"]


@pytest.fixture(scope="module")
def secured(
    model: Path,
    tls_files: dict[str, Path],
    guarded: GuardedRedis,
    ray_tls: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    (folder / "keys.yaml").write_text(entry_text(KEY_ENTRY))
    files = tls_files | {"redis_ca_file": guarded.ca_file, "api_keys_file": folder / "keys.yaml"}
    variables: dict[str, Any] = {
        f"WINNOW_{name.upper()}": str(path) for name, path in files.items()
    }
    variables["WINNOW_REDIS_URL"] = guarded.url()
    variables |= ray_tls
    arguments = ["--model", str(model), "--port", "0", "--grpc-port", "null", "--admin-port", "0"]
    process = WinnowServe(folder, [*arguments, "--kv-memory-bytes", "64MiB"], **variables)
    try:
        yield Secured(process, process.wait_until_ready(), variables)
    finally:
        process.kill()


def test_everything_is_encrypted(secured: Secured, model: Path, tls_files: dict[str, Path]) -> None:
    url = secured.url
    assert url.startswith("https://")
    body = {"model": model.name, "prompt": "a b c", "max_tokens": 5}
    context = trusting(tls_files["tls_cert_file"])
    response = httpx.post(
        f"{url}/v1/completions", json=body, timeout=60, verify=context, headers=AUTHORIZED
    )
    assert response.is_success, response.text
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http") + "/health", timeout=10)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/health", timeout=10)
    healthy = winnow("health", f"{url}/ready", **secured.variables)
    assert healthy.returncode == 0, healthy.stderr
    assert winnow("health", f"{url}/ready").returncode == 2


def test_ray_speaks_no_plain_text(secured: Secured) -> None:
    """Nor do the replicas of Ray Serve: requests pass from proxy to gateway to prefill by them."""
    processes = secured.process.processes()
    (token,) = auth_tokens(processes)
    ports = outward_ports(processes)
    assert len(ports) > 4
    for call in RAY_CALLS:
        assert {code_of(port, call, token) for port in ports} == {grpc.StatusCode.UNAVAILABLE}


def test_behind_the_proxy_only_probes_answer_without_a_key(
    secured: Secured, tls_files: dict[str, Path]
) -> None:
    """Ray Serve's proxy has two of its own, which tell no more than Winnow's."""
    context = trusting(tls_files["tls_cert_file"])
    with httpx.Client(base_url=secured.url, verify=context, timeout=30) as client:
        for path in ("/v1/models", "/metrics", "/-/nope", "/nope"):
            assert client.get(path).status_code == 401, path
        assert client.get("/-/healthz").text == "success"
        assert client.get("/-/routes").json() == {"/": "winnow"}


def test_process_lists_and_logs_have_no_secrets(secured: Secured, guarded: GuardedRedis) -> None:
    processes = secured.process.processes()
    (token,) = auth_tokens(processes)
    shown = "\n".join(part for line in of_each(processes, psutil.Process.cmdline) for part in line)
    log = secured.process.stderr.read_text()
    assert "winnow_serve" in shown and "serves on" in log
    for secret in (PASSWORD, KEY, token):
        assert secret not in shown and secret not in log


@pytest.mark.parametrize(
    ("values", "variables", "found"),
    [
        ((), {}, "status"),
        (("gateway.testKeySecret=key",), {"API_KEY": KEY}, "completion_tokens"),
    ],
    ids=["without a key", "with a key"],
)
def test_helm_test_finds_the_service_well(
    secured: Secured,
    tls_files: dict[str, Path],
    values: tuple[str, ...],
    variables: dict[str, str],
    found: str,
) -> None:
    asked = {"URL": secured.url, "TLS_CERT_FILE": str(tls_files["tls_cert_file"])}
    chosen = ("gateway.tlsSecret=public", "gateway.apiKeysSecret=keys", *values)
    done = subprocess.run(
        [sys.executable, "-c", helm_test_script(*chosen)],
        env=environment(**asked, **variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert found in done.stdout
