"""`winnow serve` with TLS on every connection, as separate processes."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from services.common.tls import trusting
from tests.deploy.chart import helm_test_script
from tests.e2e.winnow_process import WinnowServe, environment, winnow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_everything_is_encrypted(
    tiny_models: dict[str, Path],
    tls_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    variables = {f"WINNOW_{name.upper()}": str(path) for name, path in tls_files.items()}
    model = tiny_models["qwen2"]
    arguments = ["--model", str(model), "--port", "0", "--grpc-port", "null", "--admin-port", "0"]
    service = WinnowServe(tmp_path, [*arguments, "--kv-memory-bytes", "64MiB"], **variables)
    try:
        url = service.wait_until_ready()
        assert url.startswith("https://")
        body = {"model": model.name, "prompt": "a b c", "max_tokens": 5}
        context = trusting(tls_files["tls_cert_file"])
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60, verify=context)
        assert response.is_success, response.text
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health", timeout=10)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health", timeout=10)
        healthy = winnow("health", f"{url}/ready", **variables)
        assert healthy.returncode == 0, healthy.stderr
        assert winnow("health", f"{url}/ready").returncode == 2
        require_helm_test(url, tls_files["tls_cert_file"])
    finally:
        service.kill()


def require_helm_test(url: str, certificate: Path) -> None:
    """`helm test` finds the service well, also where it would have to show a key and has none."""
    variables = environment(URL=url, TLS_CERT_FILE=str(certificate))
    for found, values in (("usage", ()), ("status", ("gateway.apiKeysSecret=keys",))):
        done = subprocess.run(
            [sys.executable, "-c", helm_test_script("gateway.tlsSecret=public", *values)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert found in done.stdout
