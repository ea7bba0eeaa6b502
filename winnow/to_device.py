"""Copies from host memory to the device that the host does not wait for.

On CUDA a copy from pageable memory waits for all work on the stream, and one from pinned memory for
nothing; PyTorch does not reuse the pinned memory before it is copied.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def indices_to_device(indices: Sequence[ArrayLike], device: torch.device) -> list[Tensor]:
    """Integer arrays as int64 tensors on the device, all in one copy."""
    arrays = [np.asarray(array) for array in indices]
    packed = array_to_device(np.concatenate(arrays, axis=None, dtype=np.int64), device)
    parts = torch.split(packed, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def array_to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on the device.  It must not change afterwards."""
    return tensor_to_device(torch.from_numpy(array), device)


def tensor_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself if it is on the device; else a copy, and it may change afterwards."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
