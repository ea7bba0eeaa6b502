"""A real Prometheus scrapes a real service under load; dashboards and alerts find their data."""

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.grafana.build import FOLDER, to_json
from deploy.grafana.panels import DASHBOARDS
from deploy.metrics_page import ROLES, render_page
from tests.deadlines import SOON_S
from tests.deploy.prometheus import Prometheus
from tests.e2e.winnow_process import FREE_PORTS, ROOT, WinnowServe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = "the quick brown fox jumps over the lazy dog " * 20
LOAD_S = 12.0
HISTOGRAM_ENDS = ("_bucket", "_sum", "_count")
FOREIGN = {"process_cpu_seconds_total", "process_resident_memory_bytes"}


@pytest.fixture(scope="module")
def service(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WinnowServe]:
    pruning = ("select_tokens=128", "kv_budget=64", "min_layer=1", "observed_layers=1")
    flags = [flag for change in pruning for flag in ("--pruning", change)]
    arguments = ["--model", str(tiny_models["qwen2"]), *FREE_PORTS, *flags]
    serve = WinnowServe(
        tmp_path_factory.mktemp("serve"),
        [
            *arguments,
            *("--kv-memory-bytes", "64MiB", "--prefix-cache-bytes", "64MiB"),
            *("--quality-sample", "1"),
        ],
    )
    try:
        serve.wait_until_ready()
        yield serve
    finally:
        serve.kill()


@pytest.fixture(scope="module")
def prometheus(
    service: WinnowServe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """After some seconds of load, while it goes on."""
    targets_url = f"{service.admin_url()}/metrics/targets"
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets_url)
    try:
        with ThreadPoolExecutor(3) as threads:
            until_s = time.monotonic() + LOAD_S
            for done in [threads.submit(_ask_until, service.url, until_s, i) for i in range(3)]:
                done.result()
        _wait_for_checks(prometheus)
        yield prometheus
    finally:
        prometheus.stop()


def _ask_until(url: str, until_s: float, number: int) -> None:
    """Long and short prompts, each method's own path, an answer long enough to be cut back."""
    settings = [
        {"threshold": 1e6},
        {"threshold": 0.0, "latest_layer": None},
        {"method": "snapkv", "decode_budget": 48, "recompress_interval": 8},
    ]
    with httpx.Client(base_url=url, timeout=60) as http:
        while time.monotonic() < until_s:
            body = {"model": "qwen2", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
            body["temperature"] = 0
            answer = http.post("/v1/completions", json=body | {"winnow": settings[number]})
            assert answer.is_success, answer.text


def _wait_for_checks(prometheus: Prometheus) -> None:
    """They come when the load is over."""
    until_s = time.monotonic() + SOON_S
    while sum(prometheus.query('winnow_quality_checks_total{outcome="done"}')) < 3:
        assert time.monotonic() < until_s, "no answer is checked"
        time.sleep(0.2)


def _evaluable(expression: str) -> str:
    """As Grafana fills it in, everything picked; the load is within the interval."""
    for name, value in {"$model": ".*", "$worker": ".*", "$__rate_interval": "5m"}.items():
        expression = expression.replace(name, value)
    return expression


def _panels() -> Iterator[tuple[str, str]]:
    for path in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield f"{dashboard['title']} / {panel['title']}", target["expr"]


def _names(expression: str) -> set[str]:
    """Metrics that a query names, without the ends that histograms add."""
    found = set(re.findall(r"\b((?:winnow|process)_\w+)", expression)) - FOREIGN
    return {_family(name) for name in found}


def _family(name: str) -> str:
    for end in HISTOGRAM_ENDS:
        if name.removesuffix(end) in KNOWN:
            return name.removesuffix(end)
    return name


KNOWN = {metric.name for role in ROLES for metric in role("").described}


def test_every_process_is_scraped(prometheus: Prometheus) -> None:
    deadline_s = time.monotonic() + SOON_S
    while True:  # a scrape may take longer than it has, now and then
        targets = prometheus.get("targets")["activeTargets"]
        if [target["health"] for target in targets] == ["up"] * 3:
            break
        assert time.monotonic() < deadline_s, targets
        time.sleep(0.5)
    assert all(target["labels"]["worker"] for target in targets)
    roles = prometheus.get("query", query="winnow_build_info")["result"]
    assert {info["metric"]["role"] for info in roles} == {"gateway", "prefill", "decode"}


def test_promtool_finds_no_fault_with_the_metrics(prometheus: Prometheus) -> None:
    for target in prometheus.get("targets")["activeTargets"]:
        text = httpx.get(target["scrapeUrl"], timeout=SOON_S).content
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
        )
        complaints = [
            line
            for line in (done.stdout + done.stderr).decode().splitlines()
            if line.startswith("winnow_") and not line.split()[0].endswith("_created")
        ]
        assert complaints == []


def test_what_is_documented_is_scraped_and_the_reverse(prometheus: Prometheus) -> None:
    scraped = set(prometheus.get("label/__name__/values"))
    ours = {_family(n) for n in scraped if re.match(r"winnow_(?!.*(_created|:))", n)}
    assert ours == KNOWN


@pytest.mark.parametrize(("panel", "expression"), list(_panels()))
def test_every_panel_shows_data(prometheus: Prometheus, panel: str, expression: str) -> None:
    assert _names(expression) <= KNOWN
    values = prometheus.query(_evaluable(expression))
    assert any(not math.isnan(value) for value in values), f"{panel}: {values}"


def test_alerts_name_metrics_that_exist_and_are_silent(prometheus: Prometheus) -> None:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    for rule in [rule for group in groups for rule in group["rules"]]:
        assert _names(rule["expr"]) <= KNOWN
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["name"] for rule in rules if rule.get("state") == "firing"} == set()


def test_pruning_is_what_the_dashboard_says(prometheus: Prometheus) -> None:
    full, kept = (prometheus.query(f"sum(winnow_kv_{k}_bytes_sum)")[0] for k in ("full", "kept"))
    assert 0 < kept < full
    assert prometheus.query("sum(winnow_recompressions_total)")[0] > 0
    assert prometheus.query('sum(winnow_tokens_dropped_total{stage="decode"})')[0] > 0
    selected = prometheus.query('sum(winnow_selection_layer_count{method="asl"})')[0]
    assert selected > 0
    assert prometheus.query('winnow_no_selection_total{reason="threshold_not_met"}')[0] > 0


def test_generated_files_are_the_codes() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == render_page()
    for dashboard in DASHBOARDS:
        assert (FOLDER / f"{dashboard.uid}.json").read_text() == to_json(dashboard)
    assert len(list(FOLDER.glob("*.json"))) == len(DASHBOARDS)
