"""Adapters in a network's layers: which linear layers there are, and their stacks."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from winnow.adapters.ref import AdapterRoom
from winnow.adapters.rows import applied_rows
from winnow.adapters.stack import AdapterStack
from winnow.checkpoint import empty_network
from winnow.fused_layer import PRODUCTS, FusedLayer
from winnow.linear import product_with
from winnow.model_files import ModelDescription, load_config
from winnow.network import Network
from winnow.quantization.layers import Int8Linear

_LAYERS = "model.layers"
_SUMMED = ".product"  # what a SummedLinear calls its linear layer


class AdaptedLinear(nn.Module):
    """A linear layer of transformers', with what the rows of `applied` add."""

    def __init__(self, linear: nn.Module, stack: AdapterStack) -> None:
        super().__init__()
        self.linear = linear
        self._stack = stack

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [..., in].  Returns [..., out]."""
        rows = applied_rows()
        if rows is None:
            return self.linear(inputs)  # type: ignore[no-any-return]

        def add(output: Tensor) -> Tensor:
            tokens = self._stack.add(output.flatten(0, -2), inputs.flatten(0, -2), rows)
            return tokens.view(output.shape)

        return product_with(self.linear, inputs, add)


def linear_sizes(network: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401
    """Outputs and inputs of each linear layer in the network's layers, by its name.

    Of all ranks together.  Not of experts, which get some of the tokens in an order of their own.
    """
    return {name: (module.out_features, module.in_features) for name, module in _linears(network)}


def own_sizes(network: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401
    """As `linear_sizes`, of this rank's share."""
    return {name: tuple(module.weight.shape) for name, module in _linears(network)}


def _linears(network: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    for name, module in network.get_submodule(_LAYERS).named_modules():
        if isinstance(module, nn.Linear | Int8Linear) and "experts" not in name.split("."):
            yield f"{_LAYERS}.{name.removesuffix(_SUMMED)}", module


def described_sizes(model: ModelDescription) -> dict[str, tuple[int, int]]:
    """`linear_sizes` of a model that is not loaded."""
    return linear_sizes(Network(empty_network(load_config(model.path))))


def attach_stacks(
    network: Any,  # noqa: ANN401
    sizes: Mapping[str, tuple[int, int]],
    room: AdapterRoom,
    dtype: torch.dtype,
    rank: int = 0,
) -> list[AdapterStack]:
    """Give each product of the layers a stack; returns all.

    sizes: from `own_sizes`, before layers were fused.  rank: of this share.
    """
    stacks: list[AdapterStack] = []
    for idx, layer in enumerate(network.get_submodule(_LAYERS)):
        prefix = f"{_LAYERS}.{idx}."
        own = {name.removeprefix(prefix): s for name, s in sizes.items() if name.startswith(prefix)}
        device = next(layer.parameters()).device
        like = torch.empty(0, dtype=dtype, device=device)
        if isinstance(layer, FusedLayer):
            layer.stacks = tuple(
                _stack([name for name in names if name in own], prefix, own, room, like, rank)
                for names in PRODUCTS
            )
            stacks += layer.stacks
        else:
            stacks += _wrap(layer, prefix, own, room, like, rank)
    return stacks


def _wrap(
    layer: nn.Module,
    prefix: str,
    sizes: Mapping[str, tuple[int, int]],
    room: AdapterRoom,
    like: Tensor,
    rank: int,
) -> list[AdapterStack]:
    """Put an AdaptedLinear in the place of each linear layer."""
    stacks = []
    for name in sizes:
        stack = _stack([name], prefix, sizes, room, like, rank)
        parent, _, last = name.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, last, AdaptedLinear(getattr(owner, last), stack))
        stacks.append(stack)
    return stacks


def _stack(
    names: list[str],
    prefix: str,
    sizes: Mapping[str, tuple[int, int]],
    room: AdapterRoom,
    like: Tensor,
    rank: int,
) -> AdapterStack:
    return AdapterStack(
        [prefix + name for name in names],
        [sizes[name][0] for name in names],
        sizes[names[0]][1],
        room,
        like,
        rank,
    )
