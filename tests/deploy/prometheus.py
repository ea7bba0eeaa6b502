"""A real Prometheus with the shipped configuration."""

import re
import subprocess
from pathlib import Path
from typing import Any

import httpx

from services.common.ports import free_port
from tests.e2e.winnow_process import ROOT


class Prometheus:
    """A Prometheus with the shipped configuration, at a faster pace."""

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
