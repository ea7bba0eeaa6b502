"""The commands on a GGUF file, as their users start them."""

from pathlib import Path

import httpx
import pytest

from tests.e2e.winnow_process import FREE_PORTS, WinnowServe, winnow
from tests.gguf_in_code import write_gguf
from winnow import SamplingParams, Winnow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = "the quick brown fox jumps over the lazy dog " * 8


@pytest.fixture
def file(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-llama.Q8.gguf", tiny_models["llama"])


def test_a_service_answers_under_the_files_name(
    file: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Named by a path relative to the working directory, which its workers do not share."""
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    expected = Winnow.load(tiny_models["llama"]).generate(PROMPT, sampling)
    service = WinnowServe(tmp_path, ["--model", file.name, *FREE_PORTS], cwd=tmp_path)
    try:
        url = service.wait_until_ready()
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["tiny-llama.Q8"]
        body = {
            "model": "tiny-llama.Q8",
            "prompt": PROMPT,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"] == expected.text
        assert service.press_ctrl_c() == 0
    finally:
        service.kill()


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "the quick", "--max-tokens", "4"),
        ("explain", "--prompt", PROMPT, "-o", "report.html"),
        ("eval", "--tasks", "passkey", "--length", "256", "--samples", "1", "--budget", "64"),
    ],
    ids=lambda command: command[0],
)
def test_other_commands_take_it(file: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = winnow(*command, "--model", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("serve", *FREE_PORTS)])
def test_a_download_that_broke_off_is_told_in_the_last_line(
    file: Path, command: tuple[str, ...]
) -> None:
    file.write_bytes(file.read_bytes()[:200_000])
    done = winnow(*command, "--model", str(file))
    assert done.returncode == 2
    assert "is cut short or damaged: it has 200,000 bytes" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
