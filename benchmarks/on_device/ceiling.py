"""What the device's memory and its bus give: the ceiling that everything else is held against."""

from functools import partial
from typing import Any

import torch

from benchmarks.on_device.section import Bench, Figure, Result, attempt
from benchmarks.on_device.timing import device_seconds, wall_seconds

_ROUNDS = 5


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second that a copy within the device's memory reads and writes together."""
    source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return num_bytes / device_seconds([lambda: target.copy_(source)], device)


def measure(bench: Bench) -> Result:
    host_bytes = bench.scale.copy_bytes // 8
    rows: list[dict[str, Any]] = [{"copy": "within the device", "GB/s": bench.copy_bandwidth / 1e9}]
    for name in ("to the host", "from the host"):
        rows.append(attempt({"copy": name}, partial(_bus, bench, name, host_bytes)))
    return Result(rows, [Figure("copy within the device, GB/s", bench.copy_bandwidth / 1e9)])


def _bus(bench: Bench, name: str, num_bytes: int) -> dict[str, float]:
    bench.require_cuda()
    on_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty(num_bytes, dtype=torch.uint8, device=bench.device)
    target, source = (on_host, on_device) if name == "to the host" else (on_device, on_host)
    seconds = min(wall_seconds(lambda: target.copy_(source)) for _ in range(_ROUNDS))
    return {"GB/s": num_bytes / seconds / 1e9}
