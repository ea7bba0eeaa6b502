"""Nothing is imported from the folder in which a command is given."""

from pathlib import Path

import httpx
import pytest

from tests.e2e.winnow_process import FREE_PORTS, SCRIPT, WinnowServe, winnow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NOT_MEANT = "raise ImportError('not meant')\n"


@pytest.fixture
def cluttered(tmp_path: Path) -> Path:
    """A folder with empty folders, packages and files that are called like what Winnow imports."""
    folder = tmp_path / "cluttered"
    for name in ("winnow", "services", "proto", "evals", "torch", "grpc"):
        (folder / name).mkdir(parents=True)
    for name in ("evals/__init__", "torch/__init__", "grpc/__init__", "ray", "transformers"):
        (folder / f"{name}.py").write_text(NOT_MEANT)
    return folder


def test_generate_works_anywhere(cluttered: Path, tiny_models: dict[str, Path]) -> None:
    arguments = ("--model", str(tiny_models["llama"]), "--prompt", "the quick", "--max-tokens", "3")
    done = winnow("generate", *arguments, program=SCRIPT, cwd=cluttered, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "3 tokens generated" in done.stderr


def test_serve_works_anywhere(
    cluttered: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Ray has its workers import from where it was started."""
    arguments = ["--model", str(tiny_models["llama"]), *FREE_PORTS]
    service = WinnowServe(tmp_path, arguments, program=SCRIPT, cwd=cluttered, PYTHONPATH="")
    try:
        body = {"model": "llama", "prompt": "the quick", "max_tokens": 3}
        url = f"{service.wait_until_ready()}/v1/completions"
        assert httpx.post(url, json=body, timeout=60).is_success
    finally:
        service.kill()
