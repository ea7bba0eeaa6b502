"""Whether a checkpoint is what its configuration claims, found out before its weights are read.

The network is built on torch's meta device, where tensors have shapes but no numbers, so this takes
no memory and little time. transformers' own loader, which knows each family's renamed and fused
tensors, is given the files' tables in place of the files; then every layer runs once, to see what
attention it asks for.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from winnow.errors import UnusableModel
from winnow.folder_errors import as_unusable, first_line
from winnow.model_files import ModelDescription, load_config
from winnow.weight_files import StoredTensor, stored_tensors

logger = logging.getLogger(__name__)

_META = torch.device("meta")
_RECORDER = "winnow-recorder"
_PARTS = ("embed_tokens", "rotary_emb", "layers", "norm")
_NAMES_SHOWN = 5
_NUM_TOKENS = 4
# What layers tell their attention besides queries, keys and values, and does not change it.
_WITHOUT_EFFECT = {"scaling", "dropout", "position_ids", "use_cache", "cache_position"}
_NEVER_FOR_LACK_OF_NUMBERS = (TypeError, AttributeError, KeyError)


def require_sound(description: ModelDescription) -> None:
    """Raise UnusableModel unless the files hold this network, and Winnow can run its layers."""
    with as_unusable(f"model folder {description.path} cannot be loaded"):
        config = load_config(description.path)
        stored = stored_tensors(description.path, getattr(config, "transformers_weights", None))
        _require_layers(description, stored)
        network = _empty_network(config)
        _require_decoder(description, network)
        if getattr(config, "quantization_config", None) is None:
            _require_all_placed(description, network, stored)
        _require_known_attention(description, network)


def _require_layers(description: ModelDescription, stored: Collection[str]) -> None:
    """A configuration with a wrong number could otherwise ask for any number of layers."""
    if description.shape.num_layers > len(stored):
        raise UnusableModel(
            f"{description.path} has {len(stored)} tensors, but config.json says that there are "
            f"{description.shape.num_layers} layers"
        )


def _empty_network(config: Any) -> Any:  # noqa: ANN401 - each family has its own class
    try:
        with _META:
            network: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=_RECORDER, trust_remote_code=False
            )
    except KeyError as error:
        if error.args != (_RECORDER,):
            raise
        raise UnusableModel(
            f"{config.name_or_path} is a {config.model_type}, whose attention cannot be replaced"
        ) from error
    return network.eval()


def _require_decoder(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    body: Any = getattr(network, "model", None)
    missing = [part for part in _PARTS if not hasattr(body, part)]
    missing += [] if hasattr(network, "lm_head") else ["lm_head"]
    missing += [] if missing or all(hasattr(layer, "mlp") for layer in body.layers) else ["mlp"]
    if missing:
        raise UnusableModel(
            f"{description.path} is a {network.config.model_type}, which Winnow cannot run layer "
            f"by layer: it has no {', '.join(missing)}"
        )


def _require_all_placed(
    description: ModelDescription,
    network: Any,  # noqa: ANN401
    stored: Mapping[str, StoredTensor],
) -> None:
    """Let transformers put the files' tensors into the network, as it would the real ones."""
    tensors = {k: torch.empty(t.shape, dtype=t.dtype, device=_META) for k, t in stored.items()}
    wanted = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    loading = LoadStateDictConfig(
        device_map={"": _META},
        weight_mapping=get_model_conversion_mapping(network),  # type: ignore[arg-type]
        dtype=network.dtype,
    )
    with _no_progress_bar():
        found, _ = convert_and_load_state_dict_in_model(network, tensors, loading)
    missing = found.missing_keys - _tied_to_what_is_there(network, found.missing_keys)
    network._adjust_missing_and_unexpected_keys(found)  # takes the declared leftovers out
    require_complete(
        description,
        missing,
        found.unexpected_keys,
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
    """Raise UnusableModel unless every parameter came from the files, and every tensor has a place.

    Excepted are parameters tied to one that is there, and tensors that transformers declares to be
    leftovers: rotary frequencies of old checkpoints, layers that only speculate, and the like.
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
    """Names that share their parameter with one that is not missing."""
    groups: dict[str, set[str]] = {}
    for target, source in network.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name for group in groups.values() if group - missing for name in group}


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers shows one for each load, though this one takes no time."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Attention:
    """What a layer asked of its attention.  query, key, value: [1, heads, tokens, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_call: list[_Attention],
    **options: Any,  # noqa: ANN401 - a family's own
) -> tuple[Tensor, None]:
    asked = _Attention(query, key, value, options | {"attention_mask": attention_mask})
    attention_call.append(asked)
    return query.new_empty((*query.shape[:3], value.shape[3])).transpose(1, 2), None


AttentionInterface.register(_RECORDER, _record)


def _require_known_attention(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    for layer_idx in range(description.shape.num_layers):
        for attention in _attention_of(network, layer_idx):
            _require_shape(description, network.config.model_type, attention)
            _require_plain(description, network.config.model_type, layer_idx, attention)


@torch.inference_mode()
def _attention_of(network: Any, layer_idx: int) -> list[_Attention]:  # noqa: ANN401
    """What a layer asks for; nothing where that cannot be seen without numbers."""
    asked: list[_Attention] = []
    layer = network.model.layers[layer_idx]
    layer.mlp = nn.Identity()  # experts are chosen by numbers
    positions = torch.arange(_NUM_TOKENS, device=_META)[None]
    try:
        hidden = network.model.embed_tokens(positions)
        rope = network.model.rotary_emb(hidden, positions)
        layer(hidden, attention_mask=None, position_embeddings=rope, attention_call=asked)
    except _NEVER_FOR_LACK_OF_NUMBERS as error:
        if not asked:
            family = network.config.model_type
            raise UnusableModel(
                f"family {family} cannot be run layer by layer: {first_line(error)}"
            ) from error
    except Exception:  # what is wrong shows when the loaded model is run
        logger.debug("layer %d cannot run on the meta device", layer_idx, exc_info=True)
    return asked


def _require_shape(description: ModelDescription, family: str, attention: _Attention) -> None:
    shape = description.shape
    entries = (shape.num_kv_heads, shape.head_dim)
    wanted = ((shape.num_heads, shape.head_dim), entries, entries)
    parts = (attention.query, attention.key, attention.value)
    if tuple((part.shape[1], part.shape[3]) for part in parts) != wanted:
        sizes = ", ".join(f"{part.shape[1]} x {part.shape[3]}" for part in parts)
        raise UnusableModel(
            f"{description.path} is a {family}, for whose keys and values Winnow has no cache: "
            f"queries, keys and values (heads x numbers) are {sizes}; they must be "
            + ", ".join(f"{heads} x {numbers}" for heads, numbers in wanted)
        )


def _require_plain(
    description: ModelDescription, family: str, layer_idx: int, attention: _Attention
) -> None:
    """Softmax of scaled products over the whole prompt, and nothing else."""
    options = {k: v for k, v in attention.options.items() if v is not None}
    window = options.pop("sliding_window", description.max_positions)
    if window < description.max_positions:
        raise UnusableModel(
            f"{description.path}: layer {layer_idx} attends to {window} of "
            f"{description.max_positions} positions; its cache cannot be pruned by position"
        )
    if others := sorted(options.keys() - _WITHOUT_EFFECT):
        raise UnusableModel(
            f"{description.path} is a {family}, whose attention Winnow does not compute: layer "
            f"{layer_idx} asks for {', '.join(others)}"
        )
