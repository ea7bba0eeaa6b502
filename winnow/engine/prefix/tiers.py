"""Where a prefix store's memory is: beside the model, in host memory, or both, the faster first."""

import torch
from torch import Tensor

from winnow.engine.prefix.storage import Storage, Stored
from winnow.errors import InvalidSetting

LOCATIONS = ("device", "host")
# Memory is taken in pieces, and blocks of other depths leave gaps in them.
_SPARE_BYTES = 64 << 20


class Tier(Storage):
    """Memory of one kind for `max_bytes` of blocks.  used_bytes: what is charged to it now."""

    def __init__(self, device: torch.device, max_bytes: int, *, in_host_memory: bool) -> None:
        super().__init__(device, in_host_memory=in_host_memory, max_bytes=max_bytes + _SPARE_BYTES)
        self.beside_model = not in_host_memory
        self.limit_bytes = max_bytes
        self.used_bytes = 0

    def put(self, tensor: Tensor) -> Stored:
        """As Storage; what has no bytes takes no memory."""
        return super().put(tensor) if tensor.nbytes else Stored(tensor, storage=self)

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.limit_bytes


def make_tiers(
    device: torch.device, location: str, max_bytes: int, device_bytes: int
) -> tuple[Tier, ...]:
    """One or two tiers, the faster first.

    location: `device` or `host`, of `max_bytes`.  device_bytes: beside the model, before those of
    the host.
    """
    in_host_memory = location == "host"
    last = Tier(device, max_bytes, in_host_memory=in_host_memory)
    if not in_host_memory or not device_bytes:
        return (last,)
    return Tier(device, device_bytes, in_host_memory=False), last


def tier_of(stored: Stored) -> Tier:
    assert isinstance(stored.storage, Tier)
    return stored.storage


def require_free(device: torch.device, num_bytes: int, setting: str) -> None:
    """Raise InvalidSetting if the setting is more than a GPU has free, beside the model."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        raise InvalidSetting(
            f"{setting} is {num_bytes:,}; beside the model {free:,} bytes of {device} are free",
            param=setting,
        )
