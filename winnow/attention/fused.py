"""Which fused attention kernel of PyTorch a device takes first, and the limit of float32."""

import contextlib
from contextlib import AbstractContextManager
from math import isqrt

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from winnow.kv import ModelShape

_FIRST_WITH_CUDNN = (9, 0)  # from Hopper on, cuDNN's kernel is the fastest
_SCORES_BYTES = 4 << 30  # of one layer


def fused_kernels(device: torch.device) -> AbstractContextManager[None]:
    """In it, attention on the device takes the first kernel of its order that can compute it."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    capability = torch.cuda.get_device_capability(device)
    return sdpa_kernel(kernel_order(capability), set_priority=True)


def kernel_order(capability: tuple[int, int]) -> list[SDPBackend]:
    """PyTorch's kernels for a GPU of this compute capability, the fastest first."""
    cudnn, *others = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    if capability >= _FIRST_WITH_CUDNN:
        return [cudnn, *others]
    return [*others[:-1], cudnn, others[-1]]


def most_prompt_tokens(shape: ModelShape, device: torch.device) -> int | None:
    """The most tokens of a prompt whose attention fits into the device's memory; None: any number.

    No fused kernel for CUDA takes grouped heads in float32. Without one a layer holds the scores of
    every pair of tokens, for which _SCORES_BYTES are allowed.
    """
    is_grouped = any(group > 1 for group in shape.groups)
    if device.type != "cuda" or shape.dtype != torch.float32 or not is_grouped:
        return None
    return isqrt(_SCORES_BYTES // (shape.num_heads * torch.float32.itemsize))
