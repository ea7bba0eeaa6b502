"""What `make demo` shows, from a process of its own in another working directory."""

import re
import subprocess
import sys

import pytest

from examples.demo import PROMPT_FILE
from tests.e2e.winnow_process import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_the_demo_prunes_a_long_prompt_and_still_finds_the_hidden_number() -> None:
    prompt = PROMPT_FILE.read_text()
    key = re.search(r"special magic number for ([\w-]+)\?\nAnswer:", prompt)
    assert key is not None
    hidden = re.search(rf"magic numbers for {key[1]} is: (\d+)", prompt)
    assert hidden is not None
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        env=environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"Answer: {hidden[1]}" in done.stdout
    kept, sent = re.search(r"tokens kept\s+([\d,]+) of ([\d,]+)", done.stdout).groups()  # type: ignore[union-attr]
    assert int(kept.replace(",", "")) < int(sent.replace(",", "")) // 2
    assert "The service has stopped." in done.stdout
