"""What the formats share: their tensors in the files, and sums on packed numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.errors import UnusableModel
from winnow.weight_files import StoredTensor, read_tensor

Settings = Mapping[str, Any]  # config.json's quantization_config
_BITS_OF_WORD = 32
# Ends of names of tensors that are for quantized activations or caches.
ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".activation_scale",
)
CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors that a weight is held in.

    table: all tensors of the checkpoint.  prefix: what the parts' names begin with.
    """

    table: Mapping[str, StoredTensor]
    prefix: str
    settings: Settings

    def has(self, suffix: str) -> bool:
        return self.prefix + suffix in self.table

    def shape(self, suffix: str) -> tuple[int, ...]:
        return self.table[self.prefix + suffix].shape

    def read(self, suffix: str) -> Tensor:
        """The stored tensor; raises UnusableModel if it is missing."""
        name = self.prefix + suffix
        if name not in self.table:
            raise UnusableModel(f"tensor {name} is missing, which a quantized weight needs")
        return read_tensor(self.table[name], name)


@dataclass(frozen=True, slots=True)
class Format:
    """A way to hold a weight.

    marker: what the name of one of its parts ends with, which only quantized weights have.
    other_marker: another end that it may have, where the weight has its own name beside it.
    parts: what the other parts' names end with in its place.
    dropped: ends of names of tensors that are for something else.
    weight: what the name of the weight ends with.
    shape: of the weight.
    dequantize: the weight in float32, of that shape.
    """

    marker: str
    parts: tuple[str, ...]
    shape: Callable[[Parts], tuple[int, ...]]
    dequantize: Callable[[Parts], Tensor]
    weight: str = ".weight"
    dropped: tuple[str, ...] = ()
    other_marker: str | None = None

    def prefix_of(self, name: str, table: Mapping[str, StoredTensor]) -> str | None:
        """What the names of a weight's parts begin with, if `name` is that of its marker."""
        if name.endswith(self.marker):
            return name.removesuffix(self.marker)
        if self.other_marker is None or not name.endswith(self.other_marker):
            return None
        prefix = name.removesuffix(self.other_marker)
        return prefix if prefix + self.weight in table else None


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Numbers of `bits` each, packed into int32 along `dim`, the lowest bits first.

    Returns int32 like `words`, with 32 / bits times as many along `dim`.
    """
    shifts = torch.arange(0, _BITS_OF_WORD, bits, dtype=torch.int32)
    view = [1] * (words.ndim + 1)
    view[dim + 1] = len(shifts)
    numbers = (words.unsqueeze(dim + 1) >> shifts.view(view)) & ((1 << bits) - 1)
    return numbers.flatten(dim, dim + 1)


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, ...] | None = None) -> Tensor:
    """Each scale over its block of a weight: float32 [1], or what broadcasts to `shape`.

    scales: one, or of each block in each dimension.  shape: of the weight.
    block: its size; None: each dimension is divided evenly.
    """
    scales = scales.float()
    if scales.numel() == 1:
        return scales.flatten()
    scales = scales.view(*scales.shape, *[1] * (len(shape) - scales.ndim))
    for dim, size in enumerate(shape):
        if scales.shape[dim] not in (1, size):
            length = block[dim] if block else -(-size // scales.shape[dim])
            scales = scales.repeat_interleave(length, dim).narrow(dim, 0, size)
    return scales
