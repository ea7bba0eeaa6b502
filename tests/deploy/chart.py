"""The Helm chart, and Helm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

CHART = Path(__file__).parents[2] / "k8s" / "winnow"


def helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    own = Path(sys.executable).parent / "helm"  # where `make packages` puts it
    program = str(own) if own.exists() else shutil.which("helm")
    assert program is not None, "helm is missing: run `make packages`"
    environment = os.environ | {"HELM_CACHE_HOME": "/tmp/helm-cache"}
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def helm_test_script(*values: str) -> str:
    """What the pod of `helm test` runs in Python."""
    switches = [flag for value in values for flag in ("--set", value)]
    template = "templates/tests/completion.yaml"
    done = helm("template", "r", str(CHART), "--show-only", template, *switches)
    assert done.returncode == 0, done.stderr
    (container,) = yaml.safe_load(done.stdout)["spec"]["containers"]
    assert container["command"] == ["python", "-c"]
    (script,) = container["args"]
    return str(script)
