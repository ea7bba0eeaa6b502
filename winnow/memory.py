"""Memory of the machine: what is free, and what was freed and the C library still holds."""

import ctypes
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def give_back() -> None:
    """Give freed memory back to the system; glibc keeps what it may use again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_bytes(device: str) -> int | None:
    """What can still be allocated on the device, as far as the system says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    found = [number for number in (_of_machine(), _of_group()) if number is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def _of_group() -> int | None:
    """Of the container's limit; what it holds of files counts as free."""
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(stat.get("file", 0))
