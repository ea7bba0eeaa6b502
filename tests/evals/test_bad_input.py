"""What cannot be done as asked: one clear line, exit code 2, nothing written."""

from pathlib import Path

import pytest

from services.cli.main import main

CASES = {
    "method": (["--methods", "asl,snapvk"], "method 'snapvk' is not known; known are full,"),
    "option": (["--methods", "asl:tau=0.4"], "tau is not an option; options are "),
    "option value": (["--methods", "asl:threshold=high"], "threshold is 'high'; it must be a num"),
    "option type": (["--methods", "asl:select_tokens=64.5"], "it must be a whole number"),
    "no value": (["--methods", "asl:threshold={a"], "'{a' is not a value for threshold"),
    "a date": (["--methods", "asl:threshold=2026-02-30"], "'2026-02-30' is not a value"),
    "layer": (["--methods", "fastkv:fixed_layer=9"], "fixed_layer is 9"),
    "task": (["--tasks", "passkey,niah_single_7"], "task 'niah_single_7' is not known; known are"),
    "length": (["--length", "2kb"], "--length '2kb' is not a number of tokens"),
    "length of the model": (["--length", "16k"], "--length 16,384: the model has 8,192 positions"),
    "budget": (["--budget", "64,-1"], "--budget '-1' is not a number of tokens"),
    "budget in the window": (["--budget", "32"], "--budget 32: it must be above window_size, 32"),
    "samples": (["--samples", "0"], "--samples is 0; it must be at least 1"),
    "depths": (["--depths", "0"], "--depths is 0; it must be at least 1"),
    "a length that holds no example": (["--length", "100"], "passkey"),
    "batch": (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
    "memory": (["--kv-memory-bytes", "500000"], "--kv-memory-bytes"),
    "model": (["--model", "/nowhere/at-all"], "model folder /nowhere/at-all does not exist"),
    "pruning": (["--pruning", "kv_bugdet=3"], "'kv_bugdet' is not a pruning setting"),
    "pruning value": (["--pruning", "threshold={a"], "'{a' is not a value for threshold"),
    "device": (["--device", "xpu"], "cannot be loaded"),
    "endpoint": (["--endpoint", "http://127.0.0.1:9"], "no service answers there"),
    "no URL": (["--endpoint", "nonsense"], "--endpoint nonsense"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_in_one_line_and_nothing_is_written(
    case: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = CASES[case]
    asked = ["eval", "--tasks", "passkey", "--length", "1k", "--budget", "64", "--samples", "1"]
    model = ["--model", str(tiny_models["llama"]), "--num-threads", "1"]
    assert main([*asked, *model, "-o", str(tmp_path / "run"), *flags]) == 2
    output = capsys.readouterr()
    assert message in output.err
    lines = [line for line in output.err.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("winnow: ")
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_that_lacks_a_file(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    model = ["--model", str(tiny_models["llama"])]
    asked = ["eval", "--tasks", "passkey", "--data-dir", str(data), "-o", str(run), *model]
    assert main(asked) == 2
    assert str(data / "passkey.jsonl") in capsys.readouterr().err
    assert not run.exists()


def test_the_folder_of_another_run_is_named_before_anything_is_checked(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text("{}")
    model = ["--model", str(tiny_models["llama"])]
    wrong_too = ["--tasks", "passkey", "--length", "100"]
    assert main(["eval", *model, *wrong_too, "-o", str(tmp_path)]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_a_chat_with_a_model_that_has_no_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.models_in_code import save_tiny_model

    model = save_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    run = tmp_path / "run"
    assert main(["eval", "--chat", "--model", str(model), "-o", str(run)]) == 2
    assert "the model has no chat template" in capsys.readouterr().err
    assert not run.exists()
