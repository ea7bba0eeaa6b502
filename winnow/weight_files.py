"""The safetensors files of a model folder: their tensor tables and digests."""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable
from winnow.weight_index import INDEX, WEIGHTS, missing_shards, weight_map

_SAMPLE_BYTES = 1 << 20
_LFS_POINTER = b"version "
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as listed in a file's table."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LazyTensor(StoredTensor):
    """A tensor that is read, and dequantized, by `tensor[...]`.

    file: where it is, or one of the tensors that it is made of.
    read: gives it, of any dtype.
    is_dequantized: whether it is made of what a method of quantization made of it.
    """

    read: Callable[[], Tensor]
    is_dequantized: bool = False

    def __getitem__(self, _: Any) -> Tensor:  # noqa: ANN401 - `...`, as safetensors' slices have it
        return self.read().to(self.dtype)


def _safetensors(path: Path) -> list[Path]:
    """The folder's safetensors files, sorted by name.  Raises UnusableModel if there are none."""
    files = sorted(file for file in path.glob("*.safetensors") if not file.is_dir())
    if not files:
        raise UnusableModel(
            f"model folder {path} has no *.safetensors file (other formats can run code)"
        )
    for file in files:
        if not file.is_file():
            raise UnusableModel(f"{file} is no file, or a link to one that does not exist")
    return files


def stored_tensors(path: Path, name: str | None = None) -> dict[str, StoredTensor]:
    """The tensors that transformers loads from a model folder, by their name in the files.

    name: file name of the weights or their index, if the configuration has one.
    Raises UnusableModel for missing or broken files, or a tensor that is in two of them.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _loaded_files(path, name):
        with as_unusable(f"weights in {file} are broken"):
            table = read_table(file)
        for tensor, stored in table.items():
            if tensor in tensors:
                raise UnusableModel(
                    f"tensor {tensor} is in two files of {path}: {tensors[tensor].file.name} and "
                    f"{file.name}"
                )
            tensors[tensor] = stored
    return tensors


def _loaded_files(path: Path, name: str | None) -> list[Path]:
    """The one file with all weights, or the shards of the index, sorted by name.

    Others may lie there: copies in other formats, with an index of their own.
    Raises UnusableModel if there is none, or the index names files that are not there.
    """
    known = _safetensors(path)
    for candidate in [path / name] if name else [path / WEIGHTS, path / INDEX]:
        if candidate.suffix == ".json" and candidate.is_file():
            shards = weight_map(candidate).values()
            if reason := missing_shards(shards, {file.name for file in known}):
                raise UnusableModel(f"{candidate} names {reason}")
            return [file for file in known if file.name in shards]
        if candidate in known:
            return [candidate]
    raise UnusableModel(
        f"model folder {path} has no {name or f'{WEIGHTS} and no {INDEX}'}; its weights are in "
        f"{', '.join(file.name for file in known)}"
    )


def read_table(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by their name in it."""
    with safe_open(file, framework="pt") as stream:
        slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118 - no dict
        return {
            name: StoredTensor(file, tuple(part.get_shape()), _dtype(name, part.get_dtype()))
            for name, part in slices.items()
        }


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """name: of the tensor in its file."""
    with safe_open(stored.file, framework="pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
        return tensor


def _dtype(tensor: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"tensor {tensor} is of type {name}, which torch cannot read")
    return _DTYPES[name]


def update_digest(digest: "hashlib._Hash", path: Path, name: str | None) -> None:
    """Add the weights' file names, tables and samples (first and last megabyte) to the digest.

    name: as for `stored_tensors`.
    Raises UnusableModel for a file that is not a safetensors file or is truncated.
    """
    for file in _loaded_files(path, name):
        digest.update(file.name.encode())
        digest.update(_weight_sample(file))


def _weight_sample(file: Path) -> bytes:
    """Size, tensor table, and the first and last megabyte of a safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if prefix == _LFS_POINTER:
            raise UnusableModel(f"{file} is a pointer of Git LFS: `git lfs pull` gets the weights")
        if len(prefix) < 8 or (table := struct.unpack("<Q", prefix)[0]) > size - 8:
            raise UnusableModel(f"{file} is not a safetensors file or is cut short")
        head = stream.read(table + _SAMPLE_BYTES)
        _require_whole(file, head[:table], size - 8 - table)
        stream.seek(max(0, size - _SAMPLE_BYTES))
        return size.to_bytes(8, "little") + head + stream.read()


def _require_whole(file: Path, table: bytes, num_bytes: int) -> None:
    """Raise UnusableModel unless the tensors listed in `table` take exactly `num_bytes`."""
    try:
        tensors = {k: v for k, v in json.loads(table).items() if k != "__metadata__"}
        announced = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise UnusableModel(f"{file} is not a safetensors file") from error
    if announced != num_bytes:
        raise UnusableModel(
            f"{file} is cut short or damaged: it has {num_bytes:,} bytes of tensors; "
            f"its table announces {announced:,}"
        )
