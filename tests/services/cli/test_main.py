"""What `winnow COMMAND --help` says, and what that costs."""

import re
import subprocess
import sys

import pytest

from services.cli.main import main
from tests.e2e.winnow_process import environment
from winnow.catalog import METHODS

SLOW_TO_LOAD = {"torch", "transformers", "ray", "grpc", "matplotlib"}


@pytest.mark.parametrize("command", ["generate", "eval", "serve", "explain"])
def test_help_names_every_method(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    (listed,) = re.findall(r"method is one of ([^;]+);", capsys.readouterr().out)
    assert re.split(r",\s+", listed) == list(METHODS)


@pytest.mark.parametrize("command", ["generate", "eval", "calibrate"])
def test_help_loads_nothing_that_takes_long(command: str) -> None:
    code = (
        "import sys, winnow_serve, contextlib\n"
        f"sys.argv = ['winnow', '{command}', '--help']\n"
        "with contextlib.suppress(SystemExit):\n    winnow_serve.main()\n"
        "print(*sys.modules)"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True)
    assert "usage: winnow" in shown
    assert not SLOW_TO_LOAD & set(shown.split("\n")[-2].split())
