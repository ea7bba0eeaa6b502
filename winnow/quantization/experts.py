"""Mixtures of experts whose matrices are int8; transformers' families share one form of them."""

from typing import Any

import torch
from torch import Tensor, nn

from winnow.quantization.layers import Int8Linear


def is_experts(module: nn.Module) -> bool:
    """Whether it has the experts' matrices, stacked, and says how they are laid out."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def matrices_of(module: Any) -> tuple[str, str]:  # noqa: ANN401
    """Names of its stacks of matrices: what comes first, and down."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def as_layers(module: Any) -> None:  # noqa: ANN401
    """Replace the stacks of int8 matrices by a layer for each expert and matrix."""
    for name in matrices_of(module):
        levels, scales = getattr(module, name), getattr(module, f"{name}_scales")
        biases = getattr(module, f"{name}_bias", None)
        dtype = module.config.dtype if biases is None else biases.dtype
        layers = [
            Int8Linear(levels[i], scales[i], None if biases is None else biases[i], dtype)
            for i in range(len(levels))
        ]
        delattr(module, name)
        setattr(module, name, nn.ModuleList(layers))


def experts_forward(
    module: Any,  # noqa: ANN401
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    """hidden: [T, hidden_size].  chosen, weights: [T, k].  Returns [T, hidden_size]."""
    first, down = (getattr(module, name) for name in matrices_of(module))
    outputs = torch.zeros_like(hidden, dtype=torch.float32)
    for expert_idx in sorted({*chosen.flatten().tolist()}):
        tokens, places = torch.where(chosen == expert_idx)
        inner = first[expert_idx](hidden[tokens])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = down[expert_idx](inner)
        if module.has_post_expert_norm:
            output = module.post_expert_norm(output)
        outputs.index_add_(0, tokens, (output * weights[tokens, places, None]).float())
    return outputs.to(hidden.dtype)
