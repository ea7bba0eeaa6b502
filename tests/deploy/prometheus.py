"""A real Prometheus with the shipped configuration."""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from services.common.ports import free_port
from tests.deadlines import SOON_S
from tests.e2e.winnow_process import ROOT


class Prometheus:
    """A Prometheus with the shipped configuration, at a faster pace; it answers from the start."""

    def __init__(self, folder: Path, targets_url: str) -> None:
        config = (ROOT / "deploy/prometheus/prometheus.yaml").read_text()
        config = config.replace("http://gateway:8002/metrics/targets", targets_url)
        config = re.sub(r"interval: 15s", "interval: 1s", config)
        (folder / "prometheus.yaml").write_text(config)
        rules = (ROOT / "deploy/prometheus/alerts.yaml").read_text()
        (folder / "alerts.yaml").write_text(rules)
        self.url = f"http://127.0.0.1:{free_port()}"
        with (folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stderr=log,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + SOON_S
        while not self._is_ready():
            assert time.monotonic() < deadline_s, "Prometheus does not become ready"
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=10).is_success
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        found = self.get("query", query=expression)["result"]
        return [float(series["value"][1]) for series in found]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
