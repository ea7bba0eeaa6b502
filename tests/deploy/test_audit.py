"""The audit asks a real server of vulnerabilities, this test's own, through pip-audit."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.audit import IGNORED, PINNED, ROOT, audit, pins
from services.common.ports import free_port

VULNERABLE = {
    "id": "PYSEC-2026-1",
    "summary": "it breaks",
    "affected": [
        {
            "package": {"name": "broken", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
    ],
}


class _Vulnerabilities(BaseHTTPRequestHandler):
    """As api.osv.dev: one package has a vulnerability."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        known = asked["package"]["name"] == "broken"
        body = json.dumps({"vulns": [VULNERABLE]} if known else {}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *values: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def options() -> Iterator[list[str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Vulnerabilities)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield ["--vulnerability-service", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}"]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "requirements.lock"
    path.write_text("broken==1.0 \\\n    --hash=sha256:00\nwhole==2.0\n    # via broken==1.0\n")
    return path


def test_a_known_vulnerability_fails_the_check(lock: Path, options: list[str]) -> None:
    outcome = audit([lock], {}, options)
    assert outcome.failed
    assert "broken 1.0 has PYSEC-2026-1, fixed in 1.1" in outcome.text
    assert "2 of 2 packages were looked up" in outcome.text


def test_one_that_is_ignored_does_not(lock: Path, options: list[str]) -> None:
    assert not audit([lock], {"PYSEC-2026-1": "not called"}, options).failed


def test_without_network_it_says_so_and_does_not_fail(lock: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    outcome = audit([lock], {}, ["--vulnerability-service", "osv", "--osv-url", nobody])
    assert not outcome.failed
    assert "nobody could be asked about vulnerabilities: " in outcome.text
    assert "refused" in outcome.text


def test_everything_that_is_installed_is_asked_about() -> None:
    names = {pin.partition("==")[0] for pin in pins(PINNED)}
    assert names >= {"torch", "ray", "grpcio", "fastapi", "redis", "pytest"}
    assert all(reason for reason in IGNORED.values())


@pytest.mark.parametrize("path", ["Makefile", "deploy/Dockerfile.winnow"])
def test_what_has_a_hash_is_installed_by_it(path: str) -> None:
    """Torch has none, for its builds differ; so it comes last, when what it needs is there."""
    steps = [line for line in (ROOT / path).read_text().splitlines() if "pip install" in line]
    locked = [i for i, step in enumerate(steps) if "--require-hashes" in step]
    torch = [i for i, step in enumerate(steps) if "--constraint constraints.txt" in step]
    assert len(locked) == len(torch) == 1
    assert locked < torch


def test_torch_brings_nothing_along_but_its_device_s() -> None:
    known = {pin.partition("==")[0] for pin in pins([ROOT / "deploy" / "requirements.lock"])}
    for text in requires("torch") or ():
        needed = Requirement(text)
        is_device_s = needed.name.startswith(("nvidia-", "cuda-", "triton", "pytorch-triton"))
        if not is_device_s and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            assert canonicalize_name(needed.name) in known
