"""Where there is no library, or it cannot run, PyTorch's operations take its place."""

import logging
import shutil
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models_in_code import save_tiny_model
from tests.winnow.drive import GREEDY, UNPRUNED, admit, decode_all, make_engine, prompt, spec
from tests.winnow.kernels.cpu.forgetting import forget
from winnow.attention import GatherBackend
from winnow.kernels.choice import REFERENCE
from winnow.kernels.cpu import library, linear, masses, packed_layer
from winnow.models import load_model


@pytest.fixture(autouse=True)
def _none_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    forget()
    yield
    forget()


def test_a_model_answers_without_it_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=library.__name__)
    path = save_tiny_model(tmp_path, "qwen3", dtype=torch.bfloat16, head_dim=32)
    model = load_model(path)
    assert model._model.model.layers[0]._kernels == REFERENCE
    engine = make_engine(model)
    assert isinstance(engine._runner._steps._backend, GatherBackend)
    admit(engine, spec("a", 20, GREEDY), prompt(20), UNPRUNED)
    assert len(decode_all(engine)["a"]) == GREEDY.max_tokens
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "PyTorch's own operations are used in place of the CPU kernels: they were not built when "
        "Winnow was installed"
    ]


def test_sampling_without_it_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=library.__name__)
    assert not masses.can_sum(torch.zeros(1, 300))
    assert not masses.can_sum(torch.zeros(1, 300))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "PyTorch's own operations are used in place of the kernels for sampling: "
        "they were not built when Winnow was installed"
    )


def build(folder: Path, source: str, suffix: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    code, built = folder / "stale.c", folder / f"_library{suffix}"
    code.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(code)], check=True)


@pytest.mark.parametrize(
    "source", ["int winnow_runs_here() { return 1; }", "int winnow_version() { return 0; }"]
)
def test_one_of_another_version_is_not_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    caplog.set_level(logging.INFO, logger=library.__name__)
    build(tmp_path, source, str(sysconfig.get_config_var("EXT_SUFFIX")))
    assert not library.is_usable()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "another version of Winnow; run `make`, or install it again" in line


def test_that_of_another_interpreter_is_not_taken(tmp_path: Path) -> None:
    build(tmp_path, "int other;", ".cpython-27-x86_64-linux-gnu.so")
    with pytest.raises(OSError, match="were not built"):
        library.library()


def test_other_arguments_have_another_version() -> None:
    """If this fails, raise VERSION here and in version.h."""
    signatures = library._SIGNATURES | library._PORTABLE_SIGNATURES
    described = [(name, *map(str, args)) for name, args in signatures.items()]
    structures = (*packed_layer._Layer._fields_, *linear.Linear._fields_)
    fields = [(name, str(kind)) for name, kind, *_ in structures]
    assert (library.VERSION, zlib.crc32(repr([described, fields]).encode())) == (4, 3743780769)
