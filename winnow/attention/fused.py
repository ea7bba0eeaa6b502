"""Which fused attention kernel of PyTorch a device takes first, and the limit of float32."""

import contextlib
from contextlib import AbstractContextManager
from math import isqrt

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from winnow.kv import ModelShape

# Compute capabilities, the major number, where cuDNN's kernel is the fastest of long prompts:
# Hopper (transformers#48163) and the Blackwell of data centres (sglang#33655).
_WITH_CUDNN = (9, 10)
# cuDNN makes a plan for every shape that it has not seen, in 55 ms (flashinfer#5245) to 0.44 s
# (FunASR#3704). So it gets long prompts alone, filled up to one of a few lengths. Before 9.15.1 it
# also fails at lengths that are no multiple of 128 (pytorch#169849).
_LEAST_CUDNN_TOKENS = 8192
CUDNN_TOKENS = 1024
_SCORES_BYTES = 4 << 30  # of one layer


def takes_cudnn(query: Tensor) -> bool:
    """Whether cuDNN's kernel is the fastest for causal attention of a whole prompt.

    query: [B, H, T, D].  T is to be filled up to a multiple of CUDNN_TOKENS.
    """
    if query.device.type != "cuda" or query.dtype == torch.float32:
        return False
    is_long = query.shape[2] >= _LEAST_CUDNN_TOKENS
    return is_long and torch.cuda.get_device_capability(query.device)[0] in _WITH_CUDNN


def fused_kernels(
    device: torch.device, *, cudnn_first: bool = False
) -> AbstractContextManager[None]:
    """In it, attention on the device takes the first kernel of its order that can compute it.

    PyTorch's own order begins with cuDNN for all attention, whose every new shape waits for a plan.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(kernel_order(cudnn_first=cudnn_first), set_priority=True)


def kernel_order(*, cudnn_first: bool) -> list[SDPBackend]:
    """PyTorch's kernels, in the order in which they are tried."""
    cudnn, *others = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    if cudnn_first:
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
