"""Making weights int8 as transformers reads them, so that few are in memory as they were."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from winnow import memory
from winnow.quantization.experts import as_layers, experts_forward, is_experts, matrices_of
from winnow.quantization.int8 import quantized
from winnow.quantization.layers import Int8Embedding, Int8Linear

_NAME = "winnow-int8"
_LEAST_OUTPUTS = 16  # smaller matrices take no memory

ALL_EXPERTS_FUNCTIONS.register(_NAME, experts_forward)


class _Config(QuantizationConfigMixin):
    def __init__(self) -> None:
        self.quant_method: Any = _NAME  # of transformers' own methods it is none


def loading_options() -> dict[str, Any]:
    """Options of `from_pretrained` by which matrices, embeddings and experts become int8."""
    return {"quantization_config": _Config(), "experts_implementation": _NAME}


@register_quantizer(_NAME)
class _Quantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:  # noqa: ANN401
        modules = [*model.modules()]
        experts = [module for module in modules if is_experts(module)]
        num_experts = {len(getattr(one, matrices_of(one)[1])) for one in experts}
        for parent in modules:
            for child_name, child in [*parent.named_children()]:
                _replace(parent, child_name, child, num_experts)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:  # noqa: ANN401
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if getattr(head, "weight", None) is embeddings.weight:
            head.scales = embeddings.scales
        for module in [*model.modules()]:
            if is_experts(module):
                as_layers(module)
            if isinstance(module, Int8Embedding):
                module.restore_scale()

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:  # noqa: ANN401
        module_name, name = param_name.rsplit(".", 1)
        module = model.get_submodule(module_name)
        if isinstance(module, Int8Linear | Int8Embedding):
            return name == "weight"
        return is_experts(module) and name in matrices_of(module)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def __init__(self, quantizer: _Quantizer) -> None:
        self._quantizer = quantizer

    @torch.inference_mode()
    def convert(  # type: ignore[override] # called with names only
        self,
        input_dict: dict[str, Any],
        model: Any,  # noqa: ANN401
        **_: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """Weights by their names in the network become levels; scales go to its modules."""
        converted = {}
        for full_name, values in input_dict.items():
            value: Tensor = values[0] if isinstance(values, list) else values
            if self._quantizer.param_needs_quantization(model, full_name):
                module_name, name = full_name.rsplit(".", 1)
                value = _quantize(model.get_submodule(module_name), name, value)
            converted[full_name] = value
        memory.give_back()
        return converted


def _replace(parent: nn.Module, name: str, child: nn.Module, num_experts: set[int]) -> None:
    """Put the module for int8 weights, still empty, in the place of a child.

    What has an output for each expert stays: it decides much.
    """
    has_size = isinstance(child, nn.Linear) and child.out_features >= _LEAST_OUTPUTS
    if type(child) is nn.Linear and has_size and child.out_features not in num_experts:
        weight, scales = _empty(child.weight)
        setattr(parent, name, Int8Linear(weight, scales, child.bias, child.weight.dtype))
    elif isinstance(child, nn.Embedding):
        setattr(parent, name, Int8Embedding(child, *_empty(child.weight)))
        child._is_hf_initialized = True  # type: ignore[assignment] # nothing of it is to be made


def _empty(weight: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.empty_like(weight, dtype=torch.int8)
    return levels, levels.new_empty(len(levels), dtype=torch.float32)


def _quantize(module: Any, name: str, weight: Tensor) -> Tensor:  # noqa: ANN401
    if not is_experts(module):
        levels, module.scales = quantized(weight)
        return levels
    by_output = weight.transpose(1, 2) if module.is_transposed else weight
    levels, scales = quantized(by_output)
    setattr(module, f"{name}_scales", scales)
    return levels
