"""Each example runs as its docstring says, and shows what it promises."""

import subprocess
import sys

import pytest

from tests.e2e.winnow_process import ROOT, WinnowServe, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EXAMPLES = ROOT / "examples"
HIDDEN = "739106"  # in long_prompt.txt


def run(name: str, *arguments: str) -> list[str]:
    """The lines that an example writes, run from another folder."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env=environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_library_finds_the_hidden_number_with_a_part_of_the_prompt() -> None:
    answer, layer, tokens, kept = run("library.py")
    assert answer.strip() == HIDDEN
    assert layer.startswith("selected after layer ")
    assert tokens == "512 of 4,043 tokens went on"
    assert kept == "6% of the KV cache was kept"


def test_batch_answers_each_question_on_the_document() -> None:
    lines = sorted(run("batch.py"))
    found = [line.split(" (")[0] for line in lines]
    assert found == ["calm-river: 61804", "lazy-dog: 90357", "quick-fox: 48219"]
    assert all("512 of " in line for line in lines)


def test_openai_client_streams_the_hidden_number(service: WinnowServe) -> None:
    answer, layer, shipped = run("openai_client.py", "--url", f"{service.url}/v1")
    assert answer.strip() == HIDDEN
    assert layer.startswith("selected after layer ")
    assert shipped == "6% of the KV cache was shipped"


def test_grpc_client_streams_the_answer(service: WinnowServe) -> None:
    answer, done = run("grpc_client.py", "--address", service.grpc_address())
    assert answer.strip() == "48219"
    assert done.endswith("prompt tokens, short_prompt")


def test_grpc_client_shows_a_typed_error(service: WinnowServe) -> None:
    with pytest.raises(AssertionError, match=r"NOT_FOUND model_not_found: .*other"):
        run("grpc_client.py", "--address", service.grpc_address(), "--model", "other")


def test_a_method_of_one_s_own_prunes_and_answers() -> None:
    assert run("peak_method.py") == ["48219", "256 of 841 tokens went on"]


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert [name for name in names if f"({name})" not in listed] == []
