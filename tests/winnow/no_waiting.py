"""A device that the host must not wait for: PyTorch's meta device, watched.

Meta tensors have no data, so PyTorch itself refuses to read one on the host. Refused besides: what
would read data to know the shape of its result, and copies that wait, as those from pageable memory
do on CUDA.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_READ_DATA = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class HostWaits(AssertionError):
    """An operation that makes the host wait for the device."""


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise HostWaits, or PyTorch's own error, where the host would wait for META."""
    with _Calls(), _Operations():  # type: ignore[no-untyped-call]
        yield


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What PyTorch runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if any(map(_is_on_device, tree_leaves((args, kwargs)))) and (
            name in _READ_DATA
            or (name.startswith(("index", "_index_put")) and _has_mask(args[1]))
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        ):
            raise HostWaits(f"{func} reads data of the device")
        if name == "_to_copy" and kwargs.get("device") == META and not _is_on_device(args[0]):
            _require_async(func, kwargs.get("non_blocking"))
        if name == "copy_" and _is_on_device(args[0]) and not _is_on_device(args[1]):
            _require_async(func, (*args, kwargs.get("non_blocking"))[2])
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """What is called: tensors made of Python's numbers are copied unseen by `_Operations`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            _require_async(func, torch.device(kwargs.get("device") or "cpu") != META)
        if func is Tensor.new_tensor:
            _require_async(func, not _is_on_device(args[0]))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _is_on_device(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            _require_async(func, not any(isinstance(one, list | np.ndarray) for one in index))
        return func(*args, **kwargs)


def _has_mask(indices: Any) -> bool:
    return any(one.dtype == torch.bool for one in tree_leaves(indices) if isinstance(one, Tensor))


def _is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device == META


def _require_async(func: Any, is_async: Any) -> None:
    if not is_async:
        raise HostWaits(f"{func} copies to the device, and the host waits for it")
