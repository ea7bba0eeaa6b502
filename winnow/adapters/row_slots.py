"""RowSlots: the slot of each row's adapter, on the host and on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.adapters.rows import NO_ADAPTER, AdapterRows
from winnow.to_device import indices_to_device


class RowSlots:
    """Of a page table's rows. A recorded step reads the device's copy, which stays in place."""

    def __init__(self, num_rows: int, num_slots: int, device: torch.device) -> None:
        self._num_slots = num_slots
        self._host = [NO_ADAPTER] * num_rows
        self._device = torch.full((num_rows,), NO_ADAPTER, dtype=torch.int64, device=device)

    def put(self, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Note the rows' slots; only what has changed is sent."""
        changed = [(r, s) for r, s in zip(rows, slots, strict=True) if self._host[r] != s]
        if not changed:
            return
        for row, slot in changed:
            self._host[row] = slot
        at, to = indices_to_device(
            [list(one) for one in zip(*changed, strict=True)], self._device.device
        )
        self._device.index_copy_(0, at, to)

    def of(self, rows: Tensor) -> AdapterRows:
        """Those of rows on the device, [B]."""
        return AdapterRows.of_each(self._device[rows], self._num_slots)

    def of_launched(self, rows: list[int], on_device: Tensor) -> AdapterRows | None:
        """As `of`, told by the host what is simpler; None: no row has an adapter.

        rows, on_device: the same, the latter as [B] int64.
        """
        slots = {self._host[row] for row in rows}
        if slots == {NO_ADAPTER}:
            return None
        return AdapterRows(slots.pop()) if len(slots) == 1 else self.of(on_device)
