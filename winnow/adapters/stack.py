"""AdapterStack: all adapters' matrices of one linear product, padded to one rank.

Shapes never change, so a decode step with adapters can be recorded. Rows of different adapters take
one product with all of A: each keeps the numbers of its own adapter, the others become zeros.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from winnow.adapters.ref import AdapterRoom
from winnow.adapters.rows import AdapterRows

# A [rank, in] and B [out, rank] with its scale, of one linear layer.
Pair = tuple[Tensor, Tensor]


class AdapterStack:
    """Of a product whose output has that of P linear layers, `names`, side by side.

    num_outputs: of each.  Slot 1 is the first.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_outputs: Sequence[int],
        num_inputs: int,
        room: AdapterRoom,
        like: Tensor,
        rank: int = 0,
    ) -> None:
        """like: has the model's dtype and device.

        rank: of several, of which each has an equal share of the outputs or of the inputs.
        """
        self.names = tuple(names)
        self._rank = rank
        self._room = room
        slots, rank = room.max_adapters, room.max_rank
        self._down = like.new_zeros(slots, len(names), rank, num_inputs)  # A
        self._ups = [like.new_zeros(slots, rank, size) for size in num_outputs]  # scale * B, turned
        starts = [sum(num_outputs[:idx]) for idx in range(len(names))]
        self._columns = [
            slice(start, start + size) for start, size in zip(starts, num_outputs, strict=True)
        ]
        self._adapts: set[int] = set()  # slots with anything here

    @property
    def dtype(self) -> torch.dtype:
        return self._down.dtype

    @property
    def nbytes(self) -> int:
        return self._down.nbytes + sum(up.nbytes for up in self._ups)

    def fill(self, slot: int, pairs: Mapping[str, Pair]) -> None:
        """Put an adapter's matrices, by name, in the place of those that the slot has."""
        idx = slot - 1
        self._adapts.discard(slot)
        self._down[idx].zero_()
        for part, (name, up) in enumerate(zip(self.names, self._ups, strict=True)):
            up[idx].zero_()
            if name in pairs:
                down, scaled = pairs[name]
                down = self._share(down, 1, self._down.shape[-1])
                scaled = self._share(scaled, 0, up.shape[-1])
                self._down[idx, part, : len(down)] = down.to(self._down)
                up[idx, : len(down)] = scaled.T.to(up)
                self._adapts.add(slot)

    def _share(self, whole: Tensor, dim: int, size: int) -> Tensor:
        """This rank's part of a matrix; all of it where that is its size."""
        return whole.narrow(dim, self._rank * size if whole.shape[dim] > size else 0, size)

    def add(self, output: Tensor, inputs: Tensor, rows: AdapterRows) -> Tensor:
        """Add to a product what the tokens' adapters do.

        output: [T, sum of num_outputs], changed in place, and returned.  inputs: [T, in].
        """
        if rows.slot is not None:
            self._add_one(output, inputs, rows.slot)
            return output
        assert rows.others is not None
        num_slots, num_parts, rank, num_inputs = self._down.shape
        every = inputs @ self._down.view(-1, num_inputs).T  # [T, slots * P * rank]
        own = every.view(-1, num_slots, num_parts * rank).masked_fill(rows.others, 0)
        for part, (columns, up) in enumerate(zip(self._columns, self._ups, strict=True)):
            inner = own[:, :, part * rank : (part + 1) * rank].reshape(-1, num_slots * rank)
            output[:, columns] += inner @ up.view(num_slots * rank, -1)
        return output

    def _add_one(self, output: Tensor, inputs: Tensor, slot: int) -> None:
        if slot not in self._adapts:
            return
        rank = self._room.max_rank
        inner = inputs @ self._down[slot - 1].view(-1, inputs.shape[1]).T  # [T, P * rank]
        for part, (columns, up) in enumerate(zip(self._columns, self._ups, strict=True)):
            output[:, columns] += inner[:, part * rank : (part + 1) * rank] @ up[slot - 1]


@torch.inference_mode()
def pair_of(down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> Pair:
    """A and B as `fill` takes them; the scale is multiplied in float32.

    down: A, [rank, in].  up: B, [out, rank].
    """
    return down.to(dtype), (up.float() * scale).to(dtype)
