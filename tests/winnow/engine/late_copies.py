"""A stream of copies that, like a GPU's, are made at some time before they are waited for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from winnow.engine.outgoing import CopyStream


class LateCopies(CopyStream):
    """Makes no copy before somebody waits, and then all that were started until then, in order."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.error: Exception | None = None  # raised instead of a copy
        self._pending: list[tuple[Tensor, Tensor]] = []

    def empty(self, num_bytes: int) -> Tensor:
        self.allocated.append(num_bytes)
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)  # NaN until it is copied

    def copy_out(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        self._pending += pairs
        num_pending = len(self._pending)
        return lambda: self._copy(num_pending)

    def _copy(self, num_pending: int) -> None:
        if self.error is not None:
            raise self.error
        for idx, (target, source) in enumerate(self._pending[:num_pending]):
            target.copy_(source)
            self._pending[idx] = (target, target)  # made once
