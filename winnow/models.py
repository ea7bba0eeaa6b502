"""Loading a decoder from a model folder.

`load_model` returns a model that has completed a test prompt, or raises an error with a one-line
reason.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from winnow import memory
from winnow.adapters.layers import attach_stacks, linear_sizes, own_sizes
from winnow.adapters.ref import AdapterRoom
from winnow.adapters.slots import AdapterSlots
from winnow.attention import ATTENTION_NAME, AttentionOptions, causal_attention
from winnow.checkpoint import (
    Checkpoint,
    empty_network,
    open_checkpoint,
    require_complete,
    require_room,
    require_same_as_dequantized,
    require_sound,
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
from winnow.load_options import LoadOptions
from winnow.model_files import ModelDescription, describe_model
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
    mlp_block_tokens: int = MLP_BLOCK_TOKENS,
    split: Split | None = None,
    adapter_room: AdapterRoom | None = None,
    **options: Unpack[LoadOptions],
) -> DecoderModel:
    """Load a decoder from a folder (config, safetensors), a GGUF file, or from the hub.

    options: of `describe_model`.
    adapter_room: to set aside for adapters; None: it takes none.
    split: the share of this process, which has joined the ranks' group; see load_on_ranks.
    Raises UnusableModel if it is missing, broken, or of a kind that cannot be pruned, and
    InvalidSetting for a GPU that is not the process's first one.
    """
    if split is None:  # else it is the rank's, which `join` has made the current one
        require_first_gpu(device)
    description = describe_model(model, device=device, **options)
    require_quantize(description.quantize, device, 1 if split is None else split.num_ranks)
    checkpoint = open_checkpoint(description)
    require_sound(checkpoint)
    if description.is_dequantized:
        require_room(checkpoint, device)
    decoder = _load_decoder(checkpoint, device, split)
    _optimize(decoder, mlp_block_tokens, adapter_room, rank=0 if split is None else split.rank)
    memory.give_back()
    require_runs(decoder)
    return decoder


def _load_decoder(checkpoint: Checkpoint, device: str, split: Split | None) -> DecoderModel:
    """The decoder with its layers as transformers has them, compared with what others compute.

    Nothing else holds its weights then, which would be in memory twice once they are packed.
    """
    description = checkpoint.description
    loaded = _load_network(checkpoint, device, split)
    if description.quantization is not None and not description.is_dequantized:
        require_same_as_dequantized(checkpoint, loaded)
    is_verified = description.model_type in VERIFIED_FAMILIES
    theirs = None if is_verified else _logits_of(loaded, description, device)
    shape = description.shape if split is None else split.shape(description.shape)
    decoder = DecoderModel(Network(loaded), description, torch.device(device), shape)
    if shape.has_states:
        decoder = _with_states(decoder)
    if theirs is not None:
        _require_same_as_transformers(decoder, theirs)
    return decoder


def _load_network(checkpoint: Checkpoint, device: str, split: Split | None) -> Any:  # noqa: ANN401
    description = checkpoint.description
    options: dict[str, Any] = {
        "config": checkpoint.config,
        "dtype": description.shape.dtype,
        "attn_implementation": ATTENTION_NAME,
        "key_mapping": TENSOR_NAMES,
        "output_loading_info": True,
        **({} if split is None else loading_options(split)),
        **({} if description.quantize is None else while_loading.loading_options()),
    }
    with as_unusable(f"model {description.path} cannot be loaded"):
        load = _load_tensors if checkpoint.is_lazy else _load_files
        network, found = load(checkpoint, options)
        unexpected = without_other_parts(found["unexpected_keys"])
        require_complete(description, found["missing_keys"], unexpected)
        if split is not None:
            make_plain(network)
            split_head(network, split)
        return network.eval().requires_grad_(False).to(device)


def _load_files(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.description.path,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )


def _load_tensors(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Tensors are dequantized one by one, so that never more than a few are there twice."""
    network_class: Any = type(empty_network(checkpoint.config))
    return network_class.from_pretrained(None, state_dict={**checkpoint.tensors}, **options)


def _optimize(
    decoder: DecoderModel, mlp_block_tokens: int, room: AdapterRoom | None, rank: int
) -> None:
    """Fuse layers or run their MLPs by blocks, make room for adapters, and pack weights.

    rank: of this process's share.
    """
    network, shape = decoder.network, decoder.shape
    sizes, own = linear_sizes(network), own_sizes(network)  # of layers that are not fused yet
    is_verified = decoder.description.model_type in VERIFIED_FAMILIES
    is_fused = is_verified and fuse_layers(network, shape, mlp_block_tokens)
    if room is not None:
        stacks = attach_stacks(network, own, room, shape.dtype, rank)
        decoder.adapters = AdapterSlots(stacks, sizes, room)
    if not is_fused:
        for layer in network.model.layers:
            for name in mlp_names(layer):
                setattr(layer, name, TokenBlocks(getattr(layer, name), mlp_block_tokens))
    pack_head(network)
    pack_int8(network)


def _with_states(decoder: DecoderModel) -> DecoderModel:
    """The same network, of a shape that knows what its layers' states consist of."""
    description = decoder.description
    with as_unusable(f"Winnow cannot run {description.model_type}: {ONE_BY_ONE}"):
        states, in_parts = _states_of(decoder), _in_parts(decoder)
    shape = replace(decoder.shape, states=states, in_parts=in_parts)
    return DecoderModel(decoder.network, replace(description, shape=shape), decoder.device)


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
