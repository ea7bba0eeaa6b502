"""Runs the tests in interpreted/ in a process whose Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_every_kernel_equals_its_reference_in_the_interpreter() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    ended = subprocess.run(
        command, env=env | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
