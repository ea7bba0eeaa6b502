"""What `pip install` gives, in an environment of its own and used from another folder."""

import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.stack import DOCKERFILE
from tests.e2e.winnow_process import FREE_PORTS, ROOT, WinnowServe, environment, winnow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPT_FILE = ROOT / "examples" / "long_prompt.txt"
FOREIGN = ("services", "evals")


@dataclass
class Installed:
    """site: its site-packages."""

    bin: Path
    site: Path

    @property
    def command(self) -> tuple[str]:
        return (str(self.bin / "winnow"),)

    def winnow(self, *arguments: str, cwd: Path) -> str:
        """What a command that succeeds writes to standard output."""
        done = winnow(*arguments, program=self.command, cwd=cwd, PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, code: str) -> str:
        """What that prints."""
        command = [str(self.bin / "python"), "-c", code]
        return subprocess.check_output(command, env=environment(PYTHONPATH=""), cwd="/", text=True)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True, timeout=100)


def copy_sources(folder: Path) -> None:
    """Those that the image is built from, and no more."""
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.M):
        for source in map(ROOT.joinpath, line.split()):
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, folder / source.name, ignore=ignored)
            else:
                shutil.copy(source, folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Winnow's wheel, beside packages of others called as two of its own.

    The dependencies are this environment's. A `.pth` file leads to them, by which nothing comes
    along that is installed here as editable: that is in `.pth` files too, which are not followed.
    """
    sources, wheels, env = (tmp_path_factory.mktemp(name) for name in ("src", "wheels", "env"))
    copy_sources(sources)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(sources))
    (wheel,) = wheels.iterdir()
    venv.create(env, symlinks=True)
    pip("--python", str(env), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    for name in FOREIGN:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("is_foreign = True\n")
    return Installed(env / "bin", site)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("winnow", "winnow"),
        ("services", "winnow_serve/_private/services"),
        ("evals", "winnow_serve/_private/evals"),
        ("models/winnow-tiny", "winnow_serve/_private/models/winnow-tiny"),
    ],
)
def test_no_file_is_left_behind(installed: Installed, source: str, target: str) -> None:
    assert files_in(ROOT / source) == files_in(installed.site / target)


def files_in(folder: Path) -> set[str]:
    """Without what is compiled, and what it is compiled from."""
    others = {".pyc", ".so", ".cpp", ".h"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in others)
    return {str(path.relative_to(folder)) for path in files}


def test_the_kernels_for_cpus_are_built(installed: Installed) -> None:
    built = {path.name.split(".")[0] for path in installed.site.glob("winnow/kernels/cpu/*.so")}
    has_kernels = platform.system() == "Linux" and platform.machine() == "x86_64"
    assert built == ({"_library", "_portable"} if has_kernels else set())


@pytest.mark.parametrize("name", ["winnow", "winnow_serve"])
def test_the_package_is_imported_from_where_it_was_installed(
    installed: Installed, name: str
) -> None:
    found = installed.python(f"import {name}; print({name}.__file__)")
    assert Path(found.strip()) == installed.site / name / "__init__.py"


@pytest.mark.parametrize("name", FOREIGN)
def test_other_programs_find_other_packages_of_these_names(installed: Installed, name: str) -> None:
    assert installed.python(f"import {name}; print({name}.is_foreign)") == "True\n"


def test_generate_answers_with_the_embedded_model(installed: Installed, tmp_path: Path) -> None:
    answer = installed.winnow(
        "generate", "--prompt", "Once upon", "--max-tokens", "8", cwd=tmp_path
    )
    assert answer.strip()


def test_explain_writes_its_page(installed: Installed, tmp_path: Path) -> None:
    prompt = ("--prompt", "Once upon a time. " * 50, "--max-tokens", "4")
    installed.winnow("explain", *prompt, "-o", "page.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "page.html").read_text()


def test_eval_writes_its_summary(installed: Installed, tmp_path: Path) -> None:
    asked = ("--tasks", "passkey", "--methods", "full,asl", "--length", "1k", "--samples", "1")
    assert "passkey" in installed.winnow("eval", *asked, "--budget", "64", cwd=tmp_path)
    summary = json.loads((tmp_path / "winnow-eval" / "summary.json").read_text())
    assert {cell["method"] for cell in summary["cells"]} == {"full", "asl"}


def test_key_makes_an_entry(installed: Installed, tmp_path: Path) -> None:
    (entry,) = yaml.safe_load(installed.winnow("key", "someone", cwd=tmp_path))
    assert entry["name"] == "someone"


def test_serve_answers_with_the_embedded_model(installed: Installed, tmp_path: Path) -> None:
    service = WinnowServe(
        tmp_path, FREE_PORTS, program=installed.command, cwd=tmp_path, PYTHONPATH=""
    )
    try:
        url = service.wait_until_ready()
        assert httpx.get(f"{url}/ready").is_success
        body = {"model": "winnow-tiny", "prompt": PROMPT_FILE.read_text(), "max_tokens": 8}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"].strip()
        shares = answer["usage"]["winnow"]
        assert shares["kv_bytes_kept"] < shares["kv_bytes_full"]
        assert service.press_ctrl_c() == 0
    finally:
        service.kill()


def test_the_printed_application_can_be_built(installed: Installed, tmp_path: Path) -> None:
    config = yaml.safe_load(installed.winnow("serve", "--print-config", cwd=tmp_path))
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    code = f"from {module} import {name}; print(type({name}({application['args']!r})).__name__)"
    assert installed.python(code) == "Application\n"
