"""Copies from the host to the device that wait for nothing, and how many rows it takes at once."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CPU_ROWS = 4  # what is computed of so many stays in the cache


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device.  It must not change afterwards."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # a copy from pageable memory would wait for the stream
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def rows_on(rows: list[int], device: torch.device) -> Tensor:
    """Row indices as int64 on the device."""
    return to_device(np.array(rows, dtype=np.int64), device)


def chunks(values: Tensor) -> Iterator[slice]:
    """The rows of a [R, V] tensor in as many steps as the device needs."""
    num_rows = _CPU_ROWS if values.device.type == "cpu" else len(values)
    for start in range(0, len(values), num_rows):
        yield slice(start, start + num_rows)
