"""Checks that a checkpoint matches its configuration, before its weights are read.

The network is built on torch's meta device, where tensors have shapes but no data, so the check
takes little time and no memory. transformers' own loader, which knows each family's renamed and
fused tensors, runs on the tensor tables of the files instead of their data.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from winnow.dry_run import (
    OWN_ATTENTION,
    RECORDER,
    require_known_attention,
    require_plain_loop,
)
from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable, cannot_run
from winnow.gguf.header import read_header
from winnow.gguf.weights import GgufTensor, weights
from winnow.model_files import ModelDescription, load_config
from winnow.network import Network
from winnow.quantization.dequantize import (
    ReadTensor,
    dequantized_tensors,
    require_free,
    require_same,
    without_empty_biases,
)
from winnow.text_part import TENSOR_NAMES, without_other_parts
from winnow.weight_files import StoredTensor, stored_tensors

_META = torch.device("meta")
_NAMES_SHOWN = 5


def require_sound(description: ModelDescription) -> None:
    """Raise UnusableModel unless the files match the network and Winnow can run its layers."""
    with as_unusable(f"model {description.path} cannot be loaded"):
        config = network_config(description)
        stored = _stored_tensors(description, config)
        _require_layers(description, stored)
        network = empty_network(config)
        parts = Network(network)
        if getattr(config, "quantization_config", None) is None:
            _require_all_placed(description, network, stored)
        require_plain_loop(description, network, parts)
        require_known_attention(description, parts)


def network_config(description: ModelDescription) -> Any:  # noqa: ANN401
    """The configuration of the network that is built, whose weights may be dequantized before."""
    config = load_config(description.path)
    if description.is_dequantized:
        del config.quantization_config
    return config


def tensors_to_load(description: ModelDescription) -> Mapping[str, GgufTensor | ReadTensor]:
    """The tensors of a GGUF file, or of a checkpoint that is dequantized; none is read yet."""
    if not description.path.is_dir():
        return weights(read_header(description.path), description.shape.dtype)
    return _dequantized(description)


def require_room(description: ModelDescription, device: str) -> None:
    """Tell what dequantizing a model will take; raise UnusableModel if more than is free."""
    assert description.quantization is not None
    require_free(
        description.path,
        _dequantized(description),
        description.quantization.name,
        device,
        is_int8=description.quantize is not None,
    )


def require_same_as_dequantized(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel if a library computes something else than the files' weights."""
    if description.quantization is not None and description.quantization.form is not None:
        require_same(network, _dequantized(description), description.path)


def _dequantized(description: ModelDescription) -> dict[str, ReadTensor]:
    path, quantization = description.path, description.quantization
    assert quantization is not None, "others are loaded from their files"
    config = network_config(description)
    table = stored_tensors(path, getattr(config, "transformers_weights", None))
    tensors = dequantized_tensors(table, quantization, description.shape.dtype)
    return without_empty_biases(tensors, lambda: empty_network(config).state_dict())


def _stored_tensors(description: ModelDescription, config: Any) -> Mapping[str, StoredTensor]:  # noqa: ANN401
    path = description.path
    if path.is_dir() and not description.is_dequantized:
        return stored_tensors(path, getattr(config, "transformers_weights", None))
    return {
        name: StoredTensor(tensor.file, tensor.shape, tensor.dtype)
        for name, tensor in tensors_to_load(description).items()
    }


def _require_layers(description: ModelDescription, stored: Collection[str]) -> None:
    """Raise UnusableModel for more layers than tensors, before building such a network."""
    if description.shape.num_layers > len(stored):
        raise UnusableModel(
            f"{description.path} has {len(stored)} tensors, but config.json says that there are "
            f"{description.shape.num_layers} layers"
        )


def empty_network(config: Any) -> Any:  # noqa: ANN401 - each family has its own class
    """The network on the meta device; raises UnusableModel if its attention is its own."""
    try:
        with _META:
            network: Any = AutoModelForCausalLM.from_config(
                config, attn_implementation=RECORDER, trust_remote_code=False
            )
    except KeyError as error:
        if error.args != (RECORDER,):
            raise
        raise cannot_run(config.model_type, OWN_ATTENTION) from error
    return network.eval()


def _require_all_placed(
    description: ModelDescription,
    network: Any,  # noqa: ANN401
    stored: Mapping[str, StoredTensor],
) -> None:
    """Run transformers' loader on meta tensors; raise UnusableModel if any tensor does not fit."""
    tensors = {k: torch.empty(t.shape, dtype=t.dtype, device=_META) for k, t in stored.items()}
    wanted = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    loading = LoadStateDictConfig(
        device_map={"": _META},
        weight_mapping=get_model_conversion_mapping(network, key_mapping=TENSOR_NAMES),  # type: ignore[arg-type]
        dtype=network.dtype,
    )
    with _no_progress_bar():
        found, _ = convert_and_load_state_dict_in_model(network, tensors, loading)
    missing = found.missing_keys - _tied_to_what_is_there(network, found.missing_keys)
    network._adjust_missing_and_unexpected_keys(found)  # removes keys that may be ignored
    require_complete(
        description,
        missing,
        without_other_parts(found.unexpected_keys),
        other_shapes=[f"{k} {list(has)} for {list(is_)}" for k, has, is_ in found.mismatched_keys],
        not_converted=found.conversion_errors,
        whole_numbers=[
            f"{name} of {tensor.dtype}"
            for name, tensor in stored.items()
            if name in wanted
            and wanted[name].is_floating_point
            and not tensor.dtype.is_floating_point
        ],
    )


def require_complete(
    description: ModelDescription,
    missing: Collection[str],
    unexpected: Collection[str],
    *,
    other_shapes: Collection[str] = (),
    not_converted: Collection[str] = (),
    whole_numbers: Collection[str] = (),
) -> None:
    """Raise UnusableModel unless every parameter is in the files and every tensor is used.

    Exceptions: parameters tied to one that is present, and tensors that transformers declares
    ignorable, such as rotary frequencies of old checkpoints or layers for speculative decoding.
    """
    defects = (
        ("parameters of the network that are in no file", missing),
        ("tensors of the files that have no place in the network", unexpected),
        ("tensors of another shape than config.json says", other_shapes),
        ("tensors that cannot be converted to what the network needs", not_converted),
        ("tensors of whole numbers, with no quantization in config.json", whole_numbers),
    )
    reasons = [f"{what}: {len(names)} ({_some(names)})" for what, names in defects if names]
    if reasons:
        raise UnusableModel(f"{description.path} is not what it claims: {'; '.join(reasons)}")


def _tied_to_what_is_there(network: Any, missing: set[str]) -> set[str]:  # noqa: ANN401
    """Names tied to a parameter that is not missing."""
    groups: dict[str, set[str]] = {}
    for target, source in network.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name for group in groups.values() if group - missing for name in group}


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar, since this load takes no time."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
