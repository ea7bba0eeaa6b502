"""The weights of a GGUF file under the names that transformers expects, dequantized when read."""

from collections.abc import Iterator
from functools import partial
from math import prod

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from winnow.folder_errors import as_unusable
from winnow.gguf.architectures import architecture_of
from winnow.gguf.header import Header, TensorEntry
from winnow.weight_files import LazyTensor

_CHUNK_NUMBERS = 1 << 21  # dequantized at a time
_NOT_WEIGHTS = ("rope_freqs", "rope_factors_long", "rope_factors_short")  # they are configuration
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def _read(
    entry: TensorEntry, dtype: torch.dtype, num_paired_heads: int = 0, offset: float = 0.0
) -> Tensor:
    """All numbers of a tensor, [*entry.shape] of the dtype.

    num_paired_heads: see `Architecture.paired_heads`; 0 where rows stand as they should.
    offset: taken off each number.
    """
    num_columns = 1 if num_paired_heads and len(entry.shape) == 1 else entry.shape[-1]
    num_rows = prod(entry.shape) // num_columns
    places = _row_places(num_rows, num_paired_heads)
    out = torch.empty((num_rows, num_columns), dtype=dtype)
    begin = 0
    for rows in _read_rows(entry, num_columns):
        chunk = slice(begin, begin + len(rows))
        numbers = (rows - offset if offset else rows).to(dtype)
        out[places[chunk] if places is not None else chunk] = numbers
        begin += len(rows)
    return out.view(entry.shape)


def _row_places(num_rows: int, num_paired_heads: int) -> Tensor | None:
    """Where the rows of the file belong: those of a head at 0, d/2, 1, d/2 + 1, ..."""
    if not num_paired_heads:
        return None
    rows = torch.arange(num_rows).view(num_paired_heads, 2, -1)
    return rows.transpose(1, 2).reshape(-1)


def _read_rows(entry: TensorEntry, num_columns: int) -> Iterator[Tensor]:
    """float32 [rows, num_columns], a few rows at a time."""
    block_numbers, block_bytes = GGML_QUANT_SIZES[entry.kind]
    row_bytes = num_columns // block_numbers * block_bytes
    chunk_rows = max(1, _CHUNK_NUMBERS // num_columns)
    left = entry.num_bytes // row_bytes
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        while left:
            num_rows = min(chunk_rows, left)
            data = np.fromfile(stream, np.uint8, num_rows * row_bytes).reshape(num_rows, row_bytes)
            yield torch.from_numpy(gguf.dequantize(data, entry.kind))
            left -= num_rows


def read_numbers(entry: TensorEntry) -> list[float]:
    """A small tensor's numbers."""
    return _read(entry, torch.float32).flatten().tolist()


def weights(header: Header, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The tensors of a model, none of them read yet.

    Raises UnusableModel for one that is quantized in a way that the package gguf cannot undo.
    """

    def lazy(entry: TensorEntry, num_paired_heads: int = 0, offset: float = 0.0) -> LazyTensor:
        read = partial(_read, entry, dtype, num_paired_heads, offset)
        return LazyTensor(entry.file, entry.shape, dtype, read)

    _require_readable(header)
    architecture = architecture_of(header)
    found: dict[str, LazyTensor] = {}
    for own, entry in header.tensors.items():
        if own.rpartition(".")[0] in _NOT_WEIGHTS:
            continue
        name = architecture.tensor_name(own)
        heads = _num_heads(header, own) if architecture.is_paired(own) else 0
        if "{}" in name:
            found |= {name.format(i): lazy(part) for i, part in enumerate(_experts(entry))}
        else:
            found[name] = lazy(entry, heads, architecture.offset(own))
    return found


def _num_heads(header: Header, name: str) -> int:
    values = header.values
    num_heads = values[f"{header.architecture}.attention.head_count"]
    own = num_heads if ".attn_q." in name else None
    return int(own or values.get(f"{header.architecture}.attention.head_count_kv") or num_heads)


def _experts(entry: TensorEntry) -> Iterator[TensorEntry]:
    """shape: [experts, rows, columns] of a layer."""
    num_bytes = entry.num_bytes // entry.shape[0]
    for idx in range(entry.shape[0]):
        begin = entry.begin + idx * num_bytes
        yield TensorEntry(entry.file, entry.kind, entry.shape[1:], begin)


def _require_readable(header: Header) -> None:
    for kind in {entry.kind for entry in header.tensors.values()}:
        with as_unusable(f"{header.path} has tensors of type {kind.name}, which cannot be read"):
            _, block_bytes = GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)


def checkpoint_dtype(header: Header) -> torch.dtype:
    """Of the matrices: as they are, or bfloat16 for quantized ones, which are no more exact."""
    kinds = {entry.kind for entry in header.tensors.values() if len(entry.shape) > 1}
    if kinds - _PLAIN.keys() or GGMLQuantizationType.BF16 in kinds:
        return torch.bfloat16
    return torch.float16 if GGMLQuantizationType.F16 in kinds else torch.float32
