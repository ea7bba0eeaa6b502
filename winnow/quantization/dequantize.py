"""A quantized checkpoint's weights, dequantized one by one as they are read."""

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from winnow.errors import UnusableModel
from winnow.memory import free_bytes
from winnow.quantization.formats.base import Format, Parts
from winnow.quantization.methods import Quantization
from winnow.weight_files import LazyTensor, StoredTensor, read_tensor

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_NUM_TOKENS = 4
_TOLERANCE = 0.05


def dequantized_tensors(
    table: Mapping[str, StoredTensor], quantization: Quantization, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """What the network takes, none of it read yet.

    table: the tensors in the files.
    Raises UnusableModel if a quantized weight lacks one of its tensors.
    """
    form, settings = quantization.form, quantization.settings
    assert form is not None, f"{quantization.name} cannot be dequantized"
    found: dict[str, LazyTensor] = {}
    used = set()
    for name, stored in table.items():
        prefix = form.prefix_of(name, table)
        if prefix is None:
            continue
        parts = Parts(table, prefix, settings)
        read = partial(form.dequantize, parts)
        weight = LazyTensor(stored.file, form.shape(parts), dtype, read, is_dequantized=True)
        found[prefix + form.weight] = weight
        used |= {name, *(prefix + suffix for suffix in form.parts)}
    for name, stored in table.items():
        if name not in used and not name.endswith(form.dropped):
            read = partial(read_tensor, stored, name)
            kept = dtype if stored.dtype.is_floating_point else stored.dtype
            found[name] = LazyTensor(stored.file, stored.shape, kept, read)
    _require_no_rest(form, found)
    return found


def without_empty_biases(
    tensors: dict[str, LazyTensor], parameters: Callable[[], Collection[str]]
) -> dict[str, LazyTensor]:
    """The tensors without biases of dequantized weights that the network has none for.

    Some libraries write such a bias of zeros beside every weight. One that is not zero stays.
    parameters: gives those of the network; called where a dequantized weight has a bias.
    """

    def of_dequantized(name: str) -> bool:
        weight = tensors.get(name.removesuffix("bias") + "weight")
        return name.endswith(".bias") and weight is not None and weight.is_dequantized

    biases = {name for name in tensors if of_dequantized(name)}
    placeless = biases.difference(parameters()) if biases else biases
    empty = {name for name in placeless if not tensors[name][...].any()}
    return {name: tensor for name, tensor in tensors.items() if name not in empty}


def _require_no_rest(form: Format, found: Mapping[str, LazyTensor]) -> None:
    """Raise UnusableModel for a part of a weight that has no marker."""
    ends = tuple(part for part in form.parts if part not in ("", ".weight"))
    if ends and (rest := [name for name in found if name.endswith(ends)]):
        raise UnusableModel(f"tensor {rest[0]} belongs to a quantized weight that is not there")


@torch.inference_mode()
def require_same(network: Any, tensors: Mapping[str, LazyTensor], path: Path) -> None:  # noqa: ANN401
    """Compare a product, as a library computes it, with that of the dequantized weight.

    Raises UnusableModel if they differ by more than what quantized activations cost.
    """
    matrices = (k for k, one in tensors.items() if one.is_dequantized and len(one.shape) == 2)
    name = next(matrices, None)
    module = None if name is None else _submodule(network, name.removesuffix(".weight"))
    if name is None or module is None:
        logger.info("%s: what its library computes is not compared", path)
        return
    weight = tensors[name][...].to(network.device)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(_NUM_TOKENS, weight.shape[1], generator=random).to(weight)
    expected = F.linear(inputs, weight, getattr(module, "bias", None)).float()
    difference = float((module(inputs).float() - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise UnusableModel(
            f"{path}: its library computes {name} {difference:.2g} off what the files say; the "
            f"limit is {_TOLERANCE:g}. dequantize: true does without it"
        )


def _submodule(network: Any, name: str) -> Any:  # noqa: ANN401
    """None where transformers has other names than the files."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def require_free(
    path: Path, tensors: Mapping[str, StoredTensor], method: str, device: str, is_int8: bool
) -> None:
    """Tell what dequantizing will take; raise UnusableModel if more than is free.

    tensors: all of the model.  is_int8: whether they become that at once.
    """
    held = sum(_bytes(tensor, is_int8) for tensor in tensors.values())
    stored = sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
    what = "int8" if is_int8 else str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    told = (
        f"{path} is dequantized from {method}: {stored / _GIB:.2f} GiB in files become "
        f"{held / _GIB:.2f} GiB of {what}"
    )
    for place in dict.fromkeys(("cpu", device)):
        free = free_bytes(place)
        if free is not None:
            told += f"; {free / _GIB:.2f} GiB are free on {place}"
            if held > free:
                raise UnusableModel(told)
    logger.info("%s", told)


def _bytes(tensor: StoredTensor, is_int8: bool) -> int:
    is_matrix = len(tensor.shape) > 1
    return prod(tensor.shape) * (1 if is_int8 and is_matrix else tensor.dtype.itemsize)
