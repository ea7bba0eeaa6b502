from pathlib import Path

import pytest

from services.cli.main import main

ASKED = ("generate", "--prompt", "the quick brown fox " * 40, "--max-tokens", "2")
SMALL = ("--pruning", "select_tokens=64", "--pruning", "threshold=0")


def told(model: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main([*ASKED, *SMALL, "--model", str(model), "--num-threads", "1", *flags]) == 0
    return capsys.readouterr().err


def test_a_prompt_computed_whole_is_told_of(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    errors = told(tiny_models["llama"], capsys, "--pruning", "latest_layer=null")
    assert "no layer selected (threshold_not_met)" in errors
    assert "winnow: the prompt was computed whole: relative rank variance came down to " in errors
    assert "not below the threshold, 0; `winnow calibrate` finds settings" in errors


def test_by_default_some_layer_selects(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    errors = told(tiny_models["llama"], capsys)
    assert "selected after layer 2" in errors
    assert "computed whole" not in errors
