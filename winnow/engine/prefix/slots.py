"""Memory for many tensors of one shape, in large pieces.

Allocated one by one between what a prompt's layers need for a moment, such tensors leave holes that
nothing fits: a process then takes three times what its store holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

_CHUNK_BYTES = 32 << 20


@dataclass(slots=True, eq=False)
class _Chunk:
    """tensor: [num_slots, *shape].  free: indices of the slots that nobody has."""

    tensor: Tensor
    free: list[int]


class Slots:
    """Hands out tensors of `shape`; a chunk of which none is in use is freed, but for the last one.

    num_bytes: of one of them.  allocate: the memory of a chunk, for its shape.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_bytes: int,
        allocate: Callable[[tuple[int, ...]], Tensor],
    ) -> None:
        per_chunk = max(1, _CHUNK_BYTES // num_bytes)
        self._chunk_shape = (per_chunk, *shape)
        self._chunk_bytes = per_chunk * num_bytes
        self._allocate = allocate
        self._chunks: list[_Chunk] = []
        self._with_free: dict[_Chunk, None] = {}  # those of them that have free slots

    @property
    def allocated_bytes(self) -> int:
        """Of all chunks, in use or not."""
        return len(self._chunks) * self._chunk_bytes

    @property
    def next_bytes(self) -> int:
        """What `take` would allocate now."""
        return 0 if self._with_free else self._chunk_bytes

    def take(self) -> tuple[Tensor, Callable[[], None]]:
        """A tensor with any values, and what is to be called when it is not used any more."""
        chunk = next(iter(self._with_free), None) or self._add_chunk()
        idx = chunk.free.pop()
        if not chunk.free:
            del self._with_free[chunk]
        return chunk.tensor[idx], partial(self._give_back, chunk, idx)

    def _add_chunk(self) -> _Chunk:
        tensor = self._allocate(self._chunk_shape)
        chunk = _Chunk(tensor, list(range(len(tensor)))[::-1])
        self._chunks.append(chunk)
        self._with_free[chunk] = None
        return chunk

    def _give_back(self, chunk: _Chunk, idx: int) -> None:
        chunk.free.append(idx)
        self._with_free[chunk] = None
        if len(chunk.free) == len(chunk.tensor) and len(self._chunks) > 1:
            self._chunks.remove(chunk)
            del self._with_free[chunk]
