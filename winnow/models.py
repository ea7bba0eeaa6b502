"""Loading a decoder from a model folder.

`load_model` returns a model that has completed a test prompt, or raises an error with a one-line
reason.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from winnow import memory
from winnow.adapters.layers import attach_stacks, linear_sizes, own_sizes
from winnow.adapters.ref import AdapterRoom
from winnow.adapters.slots import AdapterSlots
from winnow.attention import ATTENTION_NAME, AttentionOptions, causal_attention
from winnow.checkpoint import (
    network_config,
    require_complete,
    require_room,
    require_same_as_dequantized,
    require_sound,
    tensors_to_load,
)
from winnow.checks import require_first_gpu
from winnow.decoder import MLP_BLOCK_TOKENS, DecoderModel, TokenBlocks
from winnow.distributed.heads import Split
from winnow.distributed.weights import loading_options, make_plain, split_head
from winnow.dry_run import ONE_BY_ONE, require_sizes
from winnow.folder_errors import as_unusable, cannot_run
from winnow.fused_layer import fuse_layers
from winnow.kv import ModelShape
from winnow.layer_state import StatePart
from winnow.linear import pack_head, pack_int8
from winnow.model_files import ModelDescription, describe_model, load_config
from winnow.network import Network
from winnow.network_parts import mlp_names
from winnow.proof import require_runs
from winnow.quantization import while_loading
from winnow.quantization.settings import require_quantize
from winnow.text_part import TENSOR_NAMES, without_other_parts

logger = logging.getLogger(__name__)

# Families whose layer-by-layer run the tests compare with transformers; any other family is
# compared when it is loaded.
VERIFIED_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral", "phi3"})


def load_model(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    max_model_len: int | None = None,
    quantize: str | None = None,
    dequantize: bool = False,
    mlp_block_tokens: int = MLP_BLOCK_TOKENS,
    split: Split | None = None,
    adapter_room: AdapterRoom | None = None,
) -> DecoderModel:
    """Load a decoder from a folder (config, safetensors) or from the hub.

    dtype, max_model_len, quantize, dequantize: see `describe_model`.
    adapter_room: to set aside for adapters; None: it takes none.
    split: the share of this process, which has joined the ranks' group; see load_on_ranks.
    Raises UnusableModel if it is missing, broken, or of a kind that cannot be pruned, and
    InvalidSetting for a GPU that is not the process's first one.
    """
    if split is None:  # else it is the rank's, which `join` has made the current one
        require_first_gpu(device)
    description = describe_model(
        model,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        quantize=quantize,
        dequantize=dequantize,
    )
    require_quantize(description.quantize, device, 1 if split is None else split.num_ranks)
    require_sound(description)
    if description.is_dequantized:
        require_room(description, device)
    shape = description.shape if split is None else split.shape(description.shape)
    loaded = _load_network(description, device, split)
    if description.quantization is not None and not description.is_dequantized:
        require_same_as_dequantized(description, loaded)
    is_verified = description.model_type in VERIFIED_FAMILIES
    theirs = None if is_verified else _logits_of(loaded, description, device)
    decoder = DecoderModel(Network(loaded), description, torch.device(device), shape)
    if shape.has_states:
        with as_unusable(f"Winnow cannot run {description.model_type}: {ONE_BY_ONE}"):
            shape = replace(shape, states=_states_of(decoder), in_parts=_in_parts(decoder))
        decoder = DecoderModel(decoder.network, replace(description, shape=shape), decoder.device)
    if theirs is not None:
        _require_same_as_transformers(decoder, theirs)
    del loaded  # or what is packed would be in memory twice
    network = decoder.network
    sizes, own = linear_sizes(network), own_sizes(network)
    is_fused = is_verified and fuse_layers(network, shape, mlp_block_tokens)
    if adapter_room is not None:
        rank = 0 if split is None else split.rank
        stacks = attach_stacks(network, own, adapter_room, shape.dtype, rank)
        decoder.adapters = AdapterSlots(stacks, sizes, adapter_room)
    if not is_fused:
        for layer in network.model.layers:
            for name in mlp_names(layer):
                setattr(layer, name, TokenBlocks(getattr(layer, name), mlp_block_tokens))
    pack_head(network)
    pack_int8(network)
    memory.give_back()
    require_runs(decoder)
    return decoder


def _load_network(description: ModelDescription, device: str, split: Split | None) -> Any:  # noqa: ANN401
    with as_unusable(f"model {description.path} cannot be loaded"):
        in_files = description.path.is_dir() and not description.is_dequantized
        load = _load_folder if in_files else _load_tensors
        network, found = load(
            description,
            dtype=description.shape.dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
            **({} if split is None else loading_options(split)),
            **({} if description.quantize is None else while_loading.loading_options()),
        )
        unexpected = without_other_parts(found["unexpected_keys"])
        require_complete(description, found["missing_keys"], unexpected)
        if split is not None:
            make_plain(network)
            split_head(network, split)
        return network.eval().requires_grad_(False).to(device)


def _load_folder(description: ModelDescription, **options: Any) -> Any:  # noqa: ANN401
    path = description.path
    return AutoModelForCausalLM.from_pretrained(
        path,
        config=load_config(path),
        key_mapping=TENSOR_NAMES,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )


def _load_tensors(description: ModelDescription, **options: Any) -> Any:  # noqa: ANN401
    """Tensors are dequantized one by one, so that never more than a few are there twice."""
    config = network_config(description)
    with torch.device("meta"):
        network_class: Any = type(AutoModelForCausalLM.from_config(config))
    state = tensors_to_load(description)
    return network_class.from_pretrained(
        None, config=config, state_dict=state, key_mapping=TENSOR_NAMES, **options
    )


@torch.inference_mode()
def _states_of(decoder: DecoderModel) -> tuple[tuple[StatePart, ...], ...]:
    """What each layer's state consists of, seen where one token has gone through it."""
    token = torch.zeros((1, 1), dtype=torch.int64, device=decoder.device)
    hidden, rope = decoder.embed(token), decoder.rope(token, token)
    found = []
    for layer_idx in range(decoder.shape.num_layers):
        state = decoder.new_state(layer_idx)
        if state is not None:
            decoder.layer(layer_idx, hidden, rope, _attend, state)
        found.append(() if state is None else state.parts)
    return tuple(found)


def _attend(_: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    return causal_attention(query, key, value, options)


@torch.inference_mode()
def _in_parts(decoder: DecoderModel) -> bool:
    """Whether the recurrent layers make of tokens in two parts what they make of all at once."""
    shape, device = decoder.shape, decoder.device
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, 4, shape.hidden_size), generator=random).to(device, shape.dtype)
    positions = torch.arange(4, device=device)[None]
    rope = decoder.rope(positions, positions)

    def outputs(layer_idx: int, *parts: slice) -> list[Tensor]:
        state = decoder.new_state(layer_idx)
        assert state is not None
        found = [
            decoder.layer(layer_idx, hidden[:, part], rope.take(part), _attend, state)
            for part in parts
        ]
        return [torch.cat(found, dim=1), *state.tensors]

    for layer_idx, layer in enumerate(shape.layers):
        if layer.is_recurrent and not layer.has_kv:
            at_once = outputs(layer_idx, slice(4))
            in_two = outputs(layer_idx, slice(2), slice(2, 4))
            for ours, theirs in zip(in_two, at_once, strict=True):
                if not _difference(ours, theirs) <= _tolerance(shape):
                    return False
    return True


def _few_tokens(description: ModelDescription, device: torch.device | str) -> Tensor:
    num_tokens = min(16, description.max_positions)
    return torch.arange(num_tokens, device=device).remainder(description.vocab_size)[None]


@torch.inference_mode()
def _logits_of(network: Any, description: ModelDescription, device: str) -> Tensor:  # noqa: ANN401
    """Those of transformers' own forward for a short prompt's last token."""
    with as_unusable(f"Winnow cannot run {description.model_type}: {ONE_BY_ONE}"):
        network.set_attn_implementation("eager")
        output = network(_few_tokens(description, device), use_cache=False)
        network.set_attn_implementation(ATTENTION_NAME)
    return output.logits[0, -1].float()  # type: ignore[no-any-return]


@torch.inference_mode()
def _require_same_as_transformers(decoder: DecoderModel, theirs: Tensor) -> None:
    """Compare our layer loop's logits with `_logits_of`; raise UnusableModel if they differ."""
    family = decoder.description.model_type
    with as_unusable(f"Winnow cannot run {family}: {ONE_BY_ONE}"):
        ours = _run_layers(decoder, _few_tokens(decoder.description, decoder.device))
    difference, tolerance = _difference(ours, theirs), _tolerance(decoder.shape)
    if not difference <= tolerance:
        raise cannot_run(
            family,
            "it computes something between its layers that Winnow does not: its logits differ by "
            f"{difference:.2g} of their size, the limit is {tolerance:g}",
        )
    logger.info(
        "family %s is not in the verified list; its logits agree (%.1g)", family, difference
    )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one, as a share of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))


def _tolerance(shape: ModelShape) -> float:
    return 1e-3 if shape.dtype == torch.float32 else 5e-2


def _run_layers(decoder: DecoderModel, token_ids: Tensor) -> Tensor:
    family, shape = decoder.description.model_type, decoder.shape

    def attend(
        idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        require_sizes(family, shape, idx, (query, key, value))
        return _attend(idx, query, key, value, options)

    positions = torch.arange(token_ids.shape[1], device=decoder.device)[None]
    hidden, rope = decoder.embed(token_ids), decoder.rope(positions, token_ids)
    for layer_idx in range(shape.num_layers):
        hidden = decoder.layer(layer_idx, hidden, rope, attend)
    return decoder.logits(hidden[:, -1])[0]
