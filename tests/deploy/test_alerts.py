"""Alerts fire when they should, stay silent when they should, and are explained."""

import re
import subprocess
from typing import Any

import yaml

from tests.e2e.winnow_process import ROOT

FOLDER = ROOT / "deploy" / "prometheus"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_and_stay_silent_as_they_should() -> None:
    promtool("test", "rules", str(FOLDER / "alerts_test.yaml"))


def test_every_alert_is_seen_firing_and_silent() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    names = {alert["alert"] for alert in alerts()}
    assert names == {check["alertname"] for check in checks if check["exp_alerts"]}
    assert names == {check["alertname"] for check in checks if not check["exp_alerts"]}


def test_every_alert_has_a_runbook() -> None:
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.M))
    assert sections == {alert["alert"] for alert in alerts()}
    for alert in alerts():
        anchor = f"docs/alerts.md#{str(alert['alert']).lower()}"
        assert alert["annotations"]["runbook"] == anchor


def test_the_configuration_is_prometheus_own() -> None:
    promtool("check", "config", str(FOLDER / "prometheus.yaml"))
