"""What is no GGUF file, or no whole one, is one line, and soon."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gguf_in_code import write_gguf
from winnow.errors import UnusableModel
from winnow.gguf.header import read_header
from winnow.model_files import describe_model

pytestmark = pytest.mark.timeout(30)
HUGE = 2**62


@pytest.fixture(scope="module")
def whole(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny_models["llama"]).read_bytes()


def refusal(content: bytes, folder: Path) -> str:
    file = folder / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UnusableModel) as caught:
        describe_model(file)
    reason = str(caught.value)
    assert "\n" not in reason and str(file) in reason
    return reason


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"GGML" + bytes(60), b"PK\3\4" + bytes(60), b"version https://git-lfs"]
)
def test_what_does_not_begin_as_one_is_none(content: bytes, tmp_path: Path) -> None:
    reason = refusal(content, tmp_path)
    assert "does not begin with GGUF" in reason or "is cut short" in reason


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])  # the last is 3 of a big-endian file
def test_other_versions_are_named(whole: bytes, version: int, tmp_path: Path) -> None:
    content = whole[:4] + struct.pack("<I", version) + whole[8:]
    assert f"is GGUF of version {version}" in refusal(content, tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_file_cut_short_says_so(whole: bytes, share: float, tmp_path: Path) -> None:
    assert "is cut short or damaged" in refusal(whole[: int(len(whole) * share)], tmp_path)


def value(name: bytes, kind: int, content: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + content


@pytest.mark.parametrize(
    ("num_tensors", "values"),
    [
        (HUGE, []),
        (0, [struct.pack("<Q", HUGE)]),
        (0, [value(b"a", 8, struct.pack("<Q", HUGE))]),
        (0, [value(b"a", 9, struct.pack("<IQ", 0, HUGE))]),
        (0, [value(b"a", 9, struct.pack("<IQ", 8, HUGE))]),
        (0, [value(b"a", 9, struct.pack("<IQ", 9, HUGE))]),
        (0, [value(b"a", 77, b"")]),
        (0, [value(b"general.alignment", 4, struct.pack("<I", 0))]),
        (1, [struct.pack("<Q", 1) + b"t" + struct.pack("<I", HUGE >> 32)]),
        (1, [struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 99, 0)]),
        (1, [struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 0, 0, 0)]),
        (1, [struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, HUGE, 0, 0)]),
        (1, [struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 31, 8, 0)]),
    ],
)
def test_counts_that_cannot_be_are_not_believed(
    num_tensors: int, values: list[bytes], tmp_path: Path
) -> None:
    """The last rows are of the tensors' table, which follows the values."""
    num_values = 0 if num_tensors == 1 else len(values)
    content = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + b"".join(values)
    refusal(content + bytes(64), tmp_path)


def remove_second(folder: Path) -> Path:
    (folder / "m-00002-of-00002.gguf").unlink()
    return folder / "m-00001-of-00002.gguf"


def name_second(folder: Path) -> Path:
    return folder / "m-00002-of-00002.gguf"


def repeat_first(folder: Path) -> Path:
    first = folder / "m-00001-of-00002.gguf"
    (folder / "m-00002-of-00002.gguf").write_bytes(first.read_bytes())
    return first


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove_second, "m-00002-of-00002.gguf is missing"),
        (name_second, "is part 2 of 2; name the first"),
        (repeat_first, "is in two files of"),
    ],
)
def test_parts_must_be_there_and_go_together(
    whole: bytes, spoil: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(whole)
    with pytest.raises(UnusableModel, match=reason):
        read_header(spoil(tmp_path))


def test_a_part_that_was_left_out_of_the_count_is_missed(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_models["llama"], split__tensors__count=99)
    with pytest.raises(UnusableModel, match="the first one announces 99"):
        describe_model(file)


def test_a_folder_with_one_file_is_that_model(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "mmproj-model.gguf").write_bytes(whole)
    file = tmp_path / "model.gguf"
    file.write_bytes(whole)
    assert describe_model(tmp_path).path == file
    assert describe_model(tmp_path) == describe_model(file)


def test_a_folder_with_several_names_them(whole: bytes, tmp_path: Path) -> None:
    for name in ("model.Q4_K_M.gguf", "model.Q8_0.gguf"):
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(UnusableModel, match=r"name one of them: model.Q4_K_M.gguf, model.Q8_0"):
        describe_model(tmp_path)


def test_a_folder_of_safetensors_stays_one_with_a_file_beside_them(
    whole: bytes, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for file in tiny_models["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.gguf").write_bytes(whole)
    assert describe_model(tmp_path).path == tmp_path


def test_a_file_is_known_by_its_content_and_links_by_their_names(
    whole: bytes, tmp_path: Path
) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(whole)
    (tmp_path / "model.gguf").symlink_to(blob)
    by_link, by_name = describe_model(tmp_path / "model.gguf"), describe_model(blob)
    assert by_link.path.name == "model.gguf"
    assert by_link.fingerprint == by_name.fingerprint


@pytest.mark.parametrize("name", ["notes.txt", "model.bin"])
def test_another_file_is_no_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("hello")
    with pytest.raises(UnusableModel, match="is a file; a model is a folder or a GGUF file"):
        describe_model(tmp_path / name)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(UnusableModel):
        describe_model(tmp_path / "model.gguf")


def test_fingerprints_tell_weights_dtypes_and_vocabularies_apart(
    whole: bytes, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(whole)
    plain = describe_model(file)
    others = [describe_model(file, dtype="bfloat16"), describe_model(file, max_model_len=64)]
    file.write_bytes(whole[:-4] + b"\1\2\3\4")
    others.append(describe_model(file))
    template = write_gguf(file, tiny_models["llama"], tokenizer__chat_template="{{ 1 }}")
    others.append(describe_model(template))
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 5
