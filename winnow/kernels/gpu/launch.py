"""What all kernels share."""

from torch import Tensor

# Products and sums may become one instruction. Triton 3.10 no longer does so unless it is told.
FUSED = {"enable_fp_fusion": True}


def needs_float32(tensor: Tensor) -> bool:
    """Whether 16-bit inputs are computed in float32: Triton's interpreter has no bfloat16."""
    return tensor.device.type == "cpu"


def require_contiguous(**tensors: Tensor) -> None:
    """Kernels compute these tensors' addresses from their shapes alone."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name} {tuple(tensor.shape)} is not contiguous"
