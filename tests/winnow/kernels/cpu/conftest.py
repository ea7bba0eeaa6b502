"""The kernels as they are in this tree, whether they were built when it was installed or not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.winnow.kernels.cpu.forgetting import forget
from winnow.kernels.cpu import library

ROOT = Path(__file__).parents[4]
CPU = Path("/proc/cpuinfo")

RUNS_HERE = CPU.exists() and "avx512_bf16" in CPU.read_text()
_ANYWHERE = {"test_library.py", "test_masses.py"}
_OF_KERNELS = {path.name for path in Path(__file__).parent.glob("test_*.py")} - _ANYWHERE
collect_ignore = [] if RUNS_HERE else sorted(_OF_KERNELS)


@pytest.fixture(scope="package", autouse=True)
def _built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("library")
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}"]
    command += [f"--build-temp={folder}/temp"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_FOLDER", folder / "winnow/kernels/cpu")
        forget()
        yield
    forget()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
