"""A rank's share of the weights, by transformers' own plan for the family.

transformers reads only the rank's slices of the files. What it leaves are DTensors behind hooks;
they become plain tensors and plain modules here, so that nothing of it runs in a forward pass but
the sum over ranks that ends each attention and each MLP.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from winnow.distributed.heads import Split
from winnow.errors import UnusableModel
from winnow.linear import SummedLinear

_WHOLE = "replicate"  # every rank has all of it
_STYLES = frozenset({"colwise", "rowwise", _WHOLE, "replicated_with_grad_allreduce"})
# Rank 0 embeds prompts by itself; of the head `split_head` leaves each rank a part.
_KEPT_WHOLE = ("model.embed_tokens", "lm_head")


def loading_options(split: Split) -> dict[str, Any]:
    """Options of `from_pretrained` that load the rank's share."""
    plan = dict.fromkeys(_KEPT_WHOLE, _WHOLE)
    return {"distributed_config": DistributedConfig(tp_size=split.num_ranks, tp_plan=plan)}


def require_splits(network: Any) -> None:  # noqa: ANN401 - each family has its own class
    """Raise UnusableModel unless the family's plan splits its attention by heads.

    Phi3's does not: each rank would compute, and hold, the KV of all heads.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UnusableModel(
            "tensor_parallel needs accelerate: pip install 'winnow-serve[tensor-parallel]'"
        )
    family = network.config.model_type
    plan = {name: one for name, one in network.tp_plan.items() if name not in _KEPT_WHOLE}
    unknown = sorted({*plan.values()} - _STYLES)
    by_heads = any(name.endswith(".k_proj") for name, style in plan.items() if style == "colwise")
    if unknown or not by_heads:
        what = f"its plan uses {', '.join(unknown)}" if unknown else "it has no plan for that"
        raise UnusableModel(f"family {family} cannot be split over ranks by its heads: {what}")


def make_plain(network: Any) -> None:  # noqa: ANN401
    """Replace transformers' distributed tensors and hooks by plain ones."""
    hooked = {name: module for name, module in network.named_modules() if "forward" in vars(module)}
    styles = {name: _style(name, network.tp_plan) for name in hooked}
    for name, module in hooked.items():
        del module.forward
        for parameter_name, parameter in [*module.named_parameters(recurse=False)]:
            if isinstance(parameter, DTensor):
                own = parameter.to_local().contiguous()
                setattr(module, parameter_name, nn.Parameter(own, requires_grad=False))
        if styles[name] == "rowwise":
            parent, _, attribute = name.rpartition(".")
            bias, module.bias = module.bias, None
            setattr(network.get_submodule(parent), attribute, SummedLinear(module, bias))
    left = [name for name, one in network.named_parameters() if isinstance(one, DTensor)]
    assert not left, f"still distributed: {left}"


def split_head(network: Any, split: Split) -> None:  # noqa: ANN401
    """Leave the LM head an equal part of the vocabulary, the last one filled up with zeros."""
    head, embeddings = network.lm_head, network.model.embed_tokens
    own = nn.Linear(head.in_features, _part(head.out_features, split), bias=False, device="meta")
    is_tied = head.weight.data_ptr() == embeddings.weight.data_ptr()
    rows = _own_rows(head.weight, split)
    own.weight = nn.Parameter(rows if is_tied else rows.clone(), requires_grad=False)
    if head.bias is not None:
        own.bias = nn.Parameter(_own_rows(head.bias, split).clone(), requires_grad=False)
    network.lm_head = own


def _own_rows(values: Tensor, split: Split) -> Tensor:
    size = _part(len(values), split)
    own = values[split.rank * size : (split.rank + 1) * size]
    missing = size - len(own)
    return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own


def _part(num_rows: int, split: Split) -> int:
    return -(-num_rows // split.num_ranks)


def _style(name: str, plan: dict[str, str]) -> str | None:
    """The style of a module; the plan has * for layer numbers."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return plan.get(".".join(parts))
