"""Commands with a model in this process take one of its adapters."""

import io
import sys
from pathlib import Path

import pytest

from services.cli.main import main
from tests.winnow.adapters.made import save_adapter
from winnow import SamplingParams, Winnow

TEXT = "the quick brown fox jumps over the lazy dog " * 8
SAMPLING = SamplingParams(max_tokens=4, temperature=0)
COMMANDS = (
    ("generate", "--prompt", TEXT),
    ("explain", "--prompt", TEXT),
    ("chat", "FILE"),
    ("eval", "--tasks", "passkey", "--length", "1k", "--samples", "1"),
    ("calibrate", "--tasks", "passkey"),
)


@pytest.fixture
def model(tiny_models: dict[str, Path], tmp_path: Path) -> tuple[str, ...]:
    folder = save_adapter(tmp_path / "law", tiny_models["llama"])
    return "--model", str(tiny_models["llama"]), "--adapters", f"law={folder}", "--num-threads", "1"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_adapter_that_is_not_named_is_refused_before_anything_is_loaded(
    command: tuple[str, ...],
    model: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    asked = [str(file) if word == "FILE" else word for word in command]
    assert main([*asked, *model, "--adapter", "low"]) == 2
    assert capsys.readouterr().err == "winnow: --adapter is low; --adapters names law\n"
    assert {path.name for path in tmp_path.iterdir()} == {"law", "text"}


@pytest.mark.parametrize(
    ("command", "flag"), [(COMMANDS[2], "--model-name"), (COMMANDS[3], "--model")]
)
def test_a_services_adapter_is_named_as_its_model(
    command: tuple[str, ...], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    asked = [str(file) if word == "FILE" else word for word in command]
    assert main([*asked, "--endpoint", "http://127.0.0.1:9", "--adapter", "law"]) == 2
    assert f"with --endpoint name it by {flag}\n" in capsys.readouterr().err


def test_the_adapter_answers(
    model: tuple[str, ...],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    winnow = Winnow.load(tiny_models["llama"], adapters={"law": tmp_path / "law"})
    answers = {name: winnow.generate(TEXT, SAMPLING, adapter=name).text for name in ("law", None)}
    assert answers["law"] != answers[None]
    own = (*model, "--adapter", "law", "--max-tokens", "4")
    assert main(["generate", "--prompt", TEXT, *own]) == 0
    assert capsys.readouterr().out == answers["law"] + "\n"
    file = tmp_path / "text"
    file.write_text(TEXT)
    said = []
    for flags in (own, own[:-4] + own[-2:]):  # with --adapter, and without
        monkeypatch.setattr(sys, "stdin", io.StringIO("who jumps?\n"))
        assert main(["chat", str(file), *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    page = tmp_path / "page.html"
    assert main(["explain", "--prompt", TEXT, "-o", str(page), *own]) == 0
    assert '"law"' in page.read_text()
