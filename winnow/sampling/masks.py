"""Masks of the tokens that a grammar allows, applied to logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.to_device import array_to_device, indices_to_device


@dataclass(frozen=True, slots=True, eq=False)
class TokenMasks:
    """The tokens that each of `rows` may sample; the others of the batch may sample any.

    bits: [len(rows), ceil(V / 32)] int32: bit i % 32 of word i // 32 is of token i.
    """

    rows: Sequence[int]
    bits: NDArray[np.int32]

    @classmethod
    def joined(cls, parts: Sequence["TokenMasks"]) -> "TokenMasks | None":
        """All of them as one; None if there are none."""
        if len(parts) < 2:
            return parts[0] if parts else None
        rows = [row for part in parts for row in part.rows]
        return cls(rows, np.concatenate([part.bits for part in parts]))


def masked(logits: Tensor, masks: TokenMasks, floor: float) -> Tensor:
    """Logits [B, V] with `floor` for the tokens that a row may not sample."""
    allowed = _allowed(masks.bits, logits)
    if masks.rows == [*range(len(logits))]:
        return logits.where(allowed, floor)
    (index,) = indices_to_device([masks.rows], logits.device)
    own = logits.index_select(0, index)
    return logits.index_copy(0, index, own.where(allowed, floor))


def _allowed(bits: NDArray[np.int32], logits: Tensor) -> Tensor:
    """The masks as [R, V] bool."""
    vocab_size = logits.shape[1]
    packed = bits.view(np.uint8)
    if logits.device.type == "cpu":
        flags = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(flags).view(torch.bool)
    return unpacked(array_to_device(packed, logits.device), vocab_size)


def unpacked(packed: Tensor, vocab_size: int) -> Tensor:
    """Bits as [R, vocab_size] bool.  packed: [R, n] uint8, the lowest bit of each first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = (packed[..., None] >> shifts) & 1  # [R, n, 8]
    return flags.flatten(1)[:, :vocab_size].bool()
