"""A model's checkpoint, and checks that it matches its configuration before weights are read.

The network is built on torch's meta device, where tensors have shapes but no data, so the check
takes little time and no memory. transformers' own loader, which knows each family's renamed and
fused tensors, runs on the tensor tables of the files instead of their data.
"""

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
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
from winnow.gguf.weights import weights
from winnow.model_files import ModelDescription, gguf_config, load_config
from winnow.network import Network
from winnow.quantization.dequantize import (
    dequantized_tensors,
    require_free,
    require_same,
    without_empty_biases,
)
from winnow.text_part import TENSOR_NAMES, without_other_parts
from winnow.weight_files import StoredTensor, stored_tensors

_META = torch.device("meta")
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the files of a model have; none of its weights is read yet.

    config: transformers', of the network that is built, whose weights may be dequantized before.
    tensors: by their names in the files, as the network takes them.
    """

    description: ModelDescription
    config: Any
    tensors: Mapping[str, StoredTensor]

    @property
    def is_lazy(self) -> bool:
        """Whether all tensors are LazyTensors; otherwise transformers reads the files itself."""
        return self.description.path.is_file() or self.description.is_dequantized


def open_checkpoint(description: ModelDescription) -> Checkpoint:
    """Raises UnusableModel for files that are missing or broken, or cannot be dequantized."""
    path, dtype = description.path, description.shape.dtype
    with as_unusable(f"model {path} cannot be loaded"):
        if path.is_file():
            header = read_header(path)
            return Checkpoint(description, gguf_config(header), weights(header, dtype))
        config = load_config(path)
        stored = stored_tensors(path, getattr(config, "transformers_weights", None))
        if not description.is_dequantized:
            return Checkpoint(description, config, stored)
        assert description.quantization is not None
        del config.quantization_config
        tensors = without_empty_biases(
            dequantized_tensors(stored, description.quantization, dtype),
            lambda: empty_network(config).state_dict(),
        )
        return Checkpoint(description, config, tensors)


def require_sound(checkpoint: Checkpoint) -> None:
    """Raise UnusableModel unless the files match the network and Winnow can run its layers."""
    description, config = checkpoint.description, checkpoint.config
    with as_unusable(f"model {description.path} cannot be loaded"):
        _require_layers(checkpoint)
        network = empty_network(config)
        parts = Network(network)
        if getattr(config, "quantization_config", None) is None:
            _require_all_placed(checkpoint, network)
        require_plain_loop(description, network, parts)
        require_known_attention(description, parts)


def require_room(checkpoint: Checkpoint, device: str) -> None:
    """Tell what dequantizing a model will take; raise UnusableModel if more than is free."""
    description = checkpoint.description
    assert description.quantization is not None
    require_free(
        description.path,
        checkpoint.tensors,
        description.quantization.name,
        device,
        is_int8=description.quantize is not None,
    )


def require_same_as_dequantized(checkpoint: Checkpoint, network: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel if a library computes something else than the files' weights."""
    description = checkpoint.description
    if description.quantization is not None and description.quantization.form is not None:
        dtype = description.shape.dtype
        tensors = dequantized_tensors(checkpoint.tensors, description.quantization, dtype)
        require_same(network, tensors, description.path)


def _require_layers(checkpoint: Checkpoint) -> None:
    """Raise UnusableModel for more layers than tensors, before building such a network."""
    description = checkpoint.description
    if description.shape.num_layers > len(checkpoint.tensors):
        raise UnusableModel(
            f"{description.path} has {len(checkpoint.tensors)} tensors, but config.json says that "
            f"there are {description.shape.num_layers} layers"
        )


def empty_network(config: Any) -> Any:  # noqa: ANN401 - each family has its own class
    """The network on the meta device; raises UnusableModel if its attention is its own."""
    try:
        with _META:
            network: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # which it changes
                attn_implementation=RECORDER,
                trust_remote_code=False,
            )
    except KeyError as error:
        if error.args != (RECORDER,):
            raise
        raise cannot_run(config.model_type, OWN_ATTENTION) from error
    return network.eval()


def _require_all_placed(checkpoint: Checkpoint, network: Any) -> None:  # noqa: ANN401
    """Run transformers' loader on meta tensors; raise UnusableModel if any tensor does not fit."""
    stored = checkpoint.tensors
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
        checkpoint.description,
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
