"""Which of the kernels a device gets: a decoder layer's, and the one for arriving KV."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.catalog import load
from winnow.kernels import activation, norm, rope, scatter
from winnow.kernels.cpu.library import LANES, is_usable
from winnow.kernels.trial import passes
from winnow.kv import ModelShape

Entries = tuple[Tensor, Tensor, Tensor]  # keys, values and positions
Scatter = Callable[[Entries, Tensor, Entries], None]

_SCATTER = "winnow.kernels.gpu.scatter"  # imported for CUDA devices only: it needs Triton


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """What a decoder layer computes between its products; see the functions of these names."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotate: Callable[..., None]
    silu_mul: Callable[[Tensor], Tensor]


REFERENCE = LayerKernels(norm.rms_norm, norm.add_rms_norm, rope.rotate, activation.silu_mul)


def layer_kernels(device: torch.device, shape: ModelShape, mlp_size: int) -> LayerKernels:
    """Those made for the device.  mlp_size: numbers of a token between the MLP's products.

    Raises ImportError if Triton is missing on a CUDA device.
    """
    if device.type == "cuda":
        return _from("gpu")  # imported for CUDA devices only: it needs Triton
    fits = shape.dtype == torch.bfloat16 and not (
        shape.hidden_size % LANES or mlp_size % LANES or shape.head_dim % (2 * LANES)
    )
    return _from("cpu") if fits and device.type == "cpu" and is_usable() else REFERENCE


def _from(kind: str) -> LayerKernels:
    package = f"winnow.kernels.{kind}"
    return LayerKernels(
        rms_norm=load(f"{package}.norm:rms_norm"),
        add_rms_norm=load(f"{package}.norm:add_rms_norm"),
        rotate=load(f"{package}.rope:rotate"),
        silu_mul=load(f"{package}.activation:silu_mul"),
    )


def scatter_for(pool: Entries) -> Scatter:
    """`winnow.kernels.scatter.scatter` for the pool's device."""
    if pool[0].device.type == "cuda" and passes(
        f"{_SCATTER}:try_out",
        pool,
        otherwise="arriving layers are written in parts, because the scatter kernel",
    ):
        kernel: Scatter = load(f"{_SCATTER}:scatter")
        return kernel
    return scatter.scatter
