"""The recipes of docs/methods.md, followed word for word in a copy of the source."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.settings import EMBEDDED_MODEL
from tests.docs.pages import ROOT, code_blocks, section
from tests.e2e.winnow_process import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = (
    "One of the special magic numbers for quick-fox is: 48219. "
    + "The grass is green. The sky is blue. " * 30
    + "\nQuestion: What is the special magic number for quick-fox?\nAnswer:"
)


def follow(folder: Path, heading: str) -> None:
    """Writes the file that a recipe names, and adds its line to the table that it names."""
    recipe = section("methods.md", heading)
    code, line = code_blocks(recipe, "python")
    (file,) = re.findall(r"\*\*1\. Write its file\*\*, `([\w/]+\.py)`", recipe)
    (table, catalog) = re.findall(r"\*\*2\. Add its line\*\* to `(\w+)` in `([\w/.]+)`", recipe)[0]
    assert not (folder / file).exists()
    (folder / file).write_text(code)
    before = (folder / catalog).read_text()
    after = before.replace(f"{table} = {{\n", f"{table} = {{\n{line}", 1)
    assert after != before
    (folder / catalog).write_text(after)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Winnow's packages with the method and the rule of the recipes."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("winnow", "services", "evals", "winnow_serve"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    follow(folder, "## Add a method")
    follow(folder, "## Add a compression rule")
    return folder


def winnow(source: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "winnow_serve", *arguments, "--model", str(EMBEDDED_MODEL)],
        env=environment(PYTHONPATH=str(source)),
        cwd=source,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_method_made_by_the_recipe_answers_a_prompt(source: Path) -> None:
    chosen = ("--pruning", "method=peak", "--pruning", "select_tokens=256")
    done = winnow(source, "generate", *chosen, "--prompt", PROMPT, "--max-tokens", "6")
    assert done.stdout.strip().startswith("48219")
    assert re.search(r"selected after layer \d+, 256 went on", done.stderr)


def test_a_rule_made_by_the_recipe_is_evaluated_beside_the_others(source: Path) -> None:
    folder = source / "out"
    tasks = ("--tasks", "passkey", "--length", "512", "--budget", "128", "--samples", "1")
    methods = "snapkv,snapkv:compression=peak"
    winnow(source, "eval", "--methods", methods, *tasks, "-o", str(folder))
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {record["method"] for record in records} == set(methods.split(","))
