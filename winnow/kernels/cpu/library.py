"""The libraries that setup.py builds of the C++ files here: one for CPUs with bfloat16 products of
AVX-512, and a portable one for any x86-64 CPU.

They need nothing of Python or PyTorch, so that they can be built without them. Their threads are
PyTorch's: both use the OpenMP library that PyTorch has loaded.
"""

import ctypes
import logging
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
VERSION = 4  # of the functions' arguments; see version.h
LANES = 16  # numbers of a vector; see vectors.h
_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "winnow_rms_norm": (*[_POINTER] * 5, *[_SIZE] * 2, _FLOAT, _INT),
    "winnow_silu_mul": (*[_POINTER] * 2, *[_SIZE] * 2, _INT),
    "winnow_rotate": (*[_POINTER] * 5, _FLOAT, *[_SIZE] * 5, _INT),
    "winnow_linear": (*[_POINTER] * 3, *[_SIZE] * 3, _INT),
    "winnow_before_attention": (*[_POINTER] * 6, _SIZE, _INT),
    "winnow_after_attention": (*[_POINTER] * 5, *[_SIZE] * 2, _INT),
    "winnow_attend": (*[_POINTER] * 7, *[_SIZE] * 10, *[_FLOAT] * 2, _INT),
    "winnow_append_and_attend": (*[_POINTER] * 14, *[_SIZE] * 13, *[_FLOAT] * 2, _INT),
    "winnow_window_scores": (*[_POINTER] * 6, *[_SIZE] * 6, _FLOAT, _INT),
    "winnow_rkv_scores": (*[_POINTER] * 6, *[_SIZE] * 7, _FLOAT, _FLOAT, _INT),
    "winnow_best_entries": (*[_POINTER] * 4, *[_SIZE] * 4, _INT),
    "winnow_compact": (*[_POINTER] * 2, _SIZE, *[_POINTER] * 3, *[_SIZE] * 4, _INT),
}
_PORTABLE_SIGNATURES = {"winnow_block_masses": (*[_POINTER] * 5, *[_SIZE] * 4, _INT)}


@cache
def library() -> ctypes.CDLL:
    """Raises OSError with the reason if it was not built, is of another version, or cannot run."""
    loaded = _load("_library", _SIGNATURES)
    if not loaded.winnow_runs_here():
        raise OSError("this CPU has no bfloat16 products of AVX-512")
    return loaded


@cache
def portable_library() -> ctypes.CDLL:
    """Raises OSError with the reason if it was not built, or is of another version."""
    return _load("_portable", _PORTABLE_SIGNATURES)


def _load(name: str, signatures: dict[str, tuple[Any, ...]]) -> ctypes.CDLL:
    path = _FOLDER / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise OSError("they were not built when Winnow was installed")
    loaded = ctypes.CDLL(str(path))
    if not hasattr(loaded, "winnow_version") or loaded.winnow_version() != VERSION:
        raise OSError(
            "they were built for another version of Winnow; run `make`, or install it again"
        )
    for function, arguments in signatures.items():
        getattr(loaded, function).argtypes = arguments
        getattr(loaded, function).restype = None
    return loaded


@cache
def is_usable() -> bool:
    """Whether the kernels can be used in this process; the log says once why not."""
    return _can(library, "the CPU kernels")


@cache
def is_portable_usable() -> bool:
    """Likewise of the portable library's."""
    return _can(portable_library, "the kernels for sampling")


def _can(load: Callable[[], ctypes.CDLL], kernels: str) -> bool:
    try:
        load()
    except OSError as error:
        logger.info("PyTorch's own operations are used in place of %s: %s", kernels, error)
        return False
    return True


@cache
def has_amx() -> bool:
    """Whether this CPU has AMX, with which oneDNN multiplies many rows faster than we do."""
    return bool(library().winnow_has_amx())


def fits(tensor: Tensor) -> bool:
    """Whether the kernels take it: bfloat16 on a CPU, with whole vectors in each row."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.is_cpu
        and tensor.shape[-1] % LANES == 0
        and tensor.stride(-1) == 1
    )


def require(**tensors: Tensor) -> None:
    """The kernels compute these tensors' addresses from their shapes alone."""
    for name, tensor in tensors.items():
        assert (
            tensor.dtype == torch.bfloat16
            and tensor.is_cpu
            and tensor.is_contiguous()
            and tensor.shape[-1] % LANES == 0
        ), f"{name} of {tensor.dtype} on {tensor.device}: {tuple(tensor.shape)}, {tensor.stride()}"
