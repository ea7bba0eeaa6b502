"""Where the tensors of cached blocks are: beside the model, or in host memory with checksums."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.prefix.reads import Reads
from winnow.engine.prefix.slots import Slots


class DamagedBlock(Exception):
    """A stored tensor has changed; `idx` is its index among those fetched."""

    def __init__(self, idx: int) -> None:
        super().__init__(f"tensor {idx} is not what was stored")
        self.idx = idx


class StorageFull(Exception):
    """There is no memory for another tensor of its shape, unless one of that shape goes."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Stored:
    """A tensor in its storage, whose memory is used again when this object is gone.

    checksum: 0-d int64 on the model's device, if the tensor was moved.
    storage: None for a tensor of somebody else's.  write: when it was put there, see Reads.
    """

    tensor: Tensor
    checksum: Tensor | None = None
    storage: "Storage | None" = None
    write: int = -1


class Storage:
    """Brings tensors to their place and back to `device`, the model's.

    in_host_memory: they are kept there, pinned if the device is a GPU. Each is checked by its
    checksum when it is fetched; both are computed on the device, so the way is checked as well.

    max_bytes: of all memory taken from the system, but for the first piece of each shape.

    Copies do not wait for the device, which makes those to host memory after what it has to do by
    then. Those from there it makes beside its work, and only they are waited for, to be checked.
    """

    def __init__(
        self, device: torch.device, *, in_host_memory: bool, max_bytes: int | None = None
    ) -> None:
        self._device = device
        self._in_host_memory = in_host_memory
        self._max_bytes = max_bytes
        self._slots: dict[tuple[torch.Size, torch.dtype], Slots] = {}
        self._reads = Reads(device)

    def put(self, tensor: Tensor) -> Stored:
        """Copy a tensor whose bytes are a multiple of 8.  Raises StorageFull."""
        checksum = _checksum(tensor) if self._in_host_memory else None
        key = tensor.shape, tensor.dtype
        if key not in self._slots:
            self._slots[key] = self._slots_for(tensor)
        slots = self._slots[key]
        self._require_room(slots)
        copy, give_back = slots.take()
        stored = Stored(copy, checksum, self, self._reads.note_write())
        weakref.finalize(stored, give_back).atexit = False
        copy.copy_(tensor, non_blocking=True)
        return stored

    @property
    def allocated_bytes(self) -> int:
        """Memory taken from the system, in use or not."""
        return sum(slots.allocated_bytes for slots in self._slots.values())

    def _require_room(self, slots: Slots) -> None:
        if self._max_bytes is None or not slots.allocated_bytes:
            return
        if slots.next_bytes and self.allocated_bytes + slots.next_bytes > self._max_bytes:
            raise StorageFull(f"{self.allocated_bytes:,} bytes of {self._max_bytes:,} are taken")

    def _slots_for(self, tensor: Tensor) -> Slots:
        device = torch.device("cpu") if self._in_host_memory else self._device
        pinned = self._in_host_memory and self._device.type == "cuda"
        dtype = tensor.dtype

        @torch.inference_mode(mode=False)  # or it could only be written to in that mode
        def allocate(shape: tuple[int, ...]) -> Tensor:
            try:
                return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
            except RuntimeError as error:  # torch's, of all allocators that have no memory left
                raise StorageFull(str(error)) from error

        return Slots(tuple(tensor.shape), tensor.nbytes, allocate)

    def fetch(self, stored: Sequence[Stored]) -> list[Tensor]:
        """The tensors on the device, to be read only; raises DamagedBlock for the first damaged.

        Others than this storage's must be on the device.
        """
        tensors = [one.tensor for one in stored]
        moved = [idx for idx, one in enumerate(stored) if one.checksum is not None]
        if moved:
            newest = max(stored[idx].write for idx in moved)
            with self._reads.after(newest) as copy:
                for idx in moved:
                    tensors[idx] = copy(tensors[idx])
                found = torch.stack([_checksum(tensors[idx]) for idx in moved])
                checksums = [one.checksum for one in stored if one.checksum is not None]
                differing = _where(found != torch.stack(checksums))
            if differing:
                raise DamagedBlock(moved[differing[0]])
        return tensors


def _where(flags: Tensor) -> list[int]:
    """The indices of what is true, for which the host waits."""
    return flags.nonzero()[:, 0].tolist()


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the tensor's 64-bit words, each times its own odd number, modulo 2^64: 0-d int64.

    No odd number divides 2^64, so a change of one word always shows.
    """
    words = tensor.contiguous().view(-1).view(torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()
