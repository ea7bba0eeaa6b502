"""What stands before the weights in a GGUF file: named values, and the table of its tensors.

The package `gguf` reads it too, at a few thousand tokens of the vocabulary a second, and believes
whatever count a broken file states.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable
from winnow.gguf import SUFFIX

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where the file does not say
_MOST_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9
_SAMPLE_BYTES = 1 << 20
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the table announces it.

    shape: as torch has it, rows last but one.  begin: of its bytes, from the file's own.
    """

    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        block_numbers, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // int(block_numbers) * int(block_bytes)


@dataclass(frozen=True, slots=True)
class Header:
    """Of a model, which may be in several files; `path` is the first one."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))


def is_gguf(path: Path) -> bool:
    """True for a file by that name, or that begins like one."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix == SUFFIX or stream.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """The header of a file; of the first one of a model in several, with the tensors of all.

    Raises UnusableModel for what is no GGUF file, is cut short, or is in parts that are not there.
    """
    header = _read_file(path)
    for part in model_files(path)[1:]:
        further = _read_file(part)
        if twice := header.tensors.keys() & further.tensors.keys():
            raise UnusableModel(f"tensor {min(twice)} is in two files of {path}")
        header = Header(path, header.values, {**header.tensors, **further.tensors})
    announced = header.values.get("split.tensors.count", len(header.tensors))
    if announced != len(header.tensors):
        raise UnusableModel(
            f"{path}: its files have {len(header.tensors)} tensors; the first one announces "
            f"{announced}"
        )
    return header


def model_files(path: Path) -> list[Path]:
    """All files of the model whose first one is `path`.

    Raises UnusableModel if one is missing, or `path` is another one than the first.
    """
    names = part_names(path.name)
    if names[0] != path.name:
        number = int(path.name.removesuffix(".gguf").split("-")[-3])
        raise UnusableModel(f"{path} is part {number} of {len(names)}; name the first, {names[0]}")
    files = [path.with_name(name) for name in names]
    if len(files) > 1 and (missing := [file.name for file in files if not file.is_file()]):
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UnusableModel(f"{path} is one of {len(files)} files; {missing[0]} is missing{more}")
    return files


def part_names(name: str) -> list[str]:
    """The files of the model to which the file of that name belongs, the first one first."""
    found = _PART.search(name)
    if found is None:
        return [name]
    stem, total = name[: found.start()], int(found[2])
    return [f"{stem}-{number:05}-of-{total:05}.gguf" for number in range(1, total + 1)]


def update_digest(digest: "hashlib._Hash", header: Header) -> None:
    """Adds what stands before the weights, and samples of them: their first and last megabyte."""
    for file in model_files(header.path):
        begins = [entry.begin for entry in header.tensors.values() if entry.file == file]
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            digest.update(stream.read(min(begins, default=0) + _SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read())


def _read_file(path: Path) -> Header:
    with as_unusable(f"{path} is not a usable GGUF file"):
        size = path.stat().st_size
        with path.open("rb") as stream:
            return _Reader(stream, size, path).header()


class _Reader:
    """Reads from front to back, and never more than the file has."""

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self._stream = stream
        self._left = size
        self._size = size
        self._path = path

    def header(self) -> Header:
        if self._take(len(MAGIC)) != MAGIC:
            raise UnusableModel(f"{self._path} is not a GGUF file: it does not begin with GGUF")
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            raise UnusableModel(
                f"{self._path} is GGUF of version {version}; readable are those of little-endian "
                f"version {' and '.join(map(str, _VERSIONS))}"
            )
        num_tensors, num_values = self._unpack("QQ")
        values = dict(self._named_value() for _ in range(num_values))
        table = [self._table_row() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment}")
        begin = -(-(self._size - self._left) // alignment) * alignment
        tensors = {
            name: self._entry(name, kind, shape, begin + offset)
            for name, kind, shape, offset in table
        }
        if len(tensors) < len(table):
            raise ValueError("it has two tensors of the same name")
        return Header(self._path, values, tensors)

    def _entry(self, name: str, kind: int, shape: tuple[int, ...], begin: int) -> TensorEntry:
        if kind not in set(GGMLQuantizationType):
            raise ValueError(
                f"tensor {name} is of type {kind}, which the package gguf does not know"
            )
        entry = TensorEntry(self._path, GGMLQuantizationType(kind), shape, begin)
        block_numbers, _ = GGML_QUANT_SIZES[entry.kind]
        if not shape or min(shape) < 1 or shape[-1] % block_numbers:
            raise ValueError(f"tensor {name} of type {entry.kind.name} has shape {list(shape)}")
        if begin + entry.num_bytes > self._size:
            raise UnusableModel(
                f"{self._path} is cut short or damaged: it has {self._size:,} bytes; its table "
                f"announces {begin + entry.num_bytes:,}"
            )
        return entry

    def _table_row(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        (num_dimensions,) = self._unpack("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = self._unpack(f"{num_dimensions}Q")
        kind, offset = self._unpack("IQ")
        return name, kind, shape[::-1], offset

    def _named_value(self) -> tuple[str, Any]:
        name = self._string()
        (kind,) = self._unpack("I")
        return name, self._value(kind)

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"it has a value of type {kind}")
        of_kind, length = self._unpack("IQ")
        if of_kind == _STRING:
            return [self._string() for _ in range(length)]
        if of_kind not in _SCALARS:
            raise ValueError(f"it has a list of type {of_kind}")
        code = _SCALARS[of_kind]
        self._require(length * struct.calcsize("<" + code))
        return list(self._unpack(f"{length}{code}"))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        return self._take(length).decode(errors="replace")

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))

    def _take(self, num_bytes: int) -> bytes:
        self._require(num_bytes)
        self._left -= num_bytes
        return self._stream.read(num_bytes)

    def _require(self, num_bytes: int) -> None:
        if num_bytes > self._left:
            raise UnusableModel(
                f"{self._path} is cut short or damaged: its header goes beyond its "
                f"{self._size:,} bytes"
            )
