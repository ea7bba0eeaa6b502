"""Checks, without weights, that a network can be run layer by layer.

The layers run once on torch's meta device, to record the attention that they request. Then the
network's own forward runs with its parts replaced by random outputs, to detect anything that it
computes between them.
"""

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from winnow.errors import UnusableModel
from winnow.folder_errors import first_line
from winnow.model_files import ModelDescription
from winnow.network import Network
from winnow.network_parts import mlp_names
from winnow.temperature import HANDED

logger = logging.getLogger(__name__)

RECORDER = "winnow-recorder"  # attention implementation of networks that are checked here

_META = torch.device("meta")
_NUM_TOKENS = 4
# Options that layers pass to their attention without changing its result.
_WITHOUT_EFFECT = {
    *("scaling", "dropout", "position_ids", "use_cache", "cache_position"),
    *("output_attentions", "output_router_logits"),
}
# What a network may hand its layers: Winnow does so too, or it has no effect on one prompt alone.
_HANDED_ON = {
    *("attention_mask", "position_ids", "position_embeddings", "past_key_values", "layer_past"),
    *("use_cache", "cache_params", "output_attentions", "output_router_logits"),
}
_COMPUTED = {"softcap", "s_aux"}  # as AttentionOptions has them
_NEVER_FOR_LACK_OF_NUMBERS = (TypeError, AttributeError, KeyError)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Arguments of an attention call.  query, key, value: [1, heads, tokens, head_dim]."""

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
    attention_call: list[_Attention] | None = None,
    **options: Any,  # noqa: ANN401 - a family's own
) -> tuple[Tensor, None]:
    if attention_call is None:
        raise TypeError("its layers do not hand on what their attention is to be called with")
    asked = _Attention(query, key, value, options | {"attention_mask": attention_mask})
    attention_call.append(asked)
    return query.new_empty((*query.shape[:3], value.shape[3])).transpose(1, 2), None


AttentionInterface.register(RECORDER, _record)


def require_known_attention(description: ModelDescription, network: Network) -> None:
    for layer_idx in range(description.shape.num_layers):
        asked = _attention_of(network, layer_idx, description.shape.layers[layer_idx].has_kv)
        if len(asked) > 1:
            raise UnusableModel(
                f"{description.path} is a {network.config.model_type}, whose attention Winnow does "
                f"not compute: layer {layer_idx} attends {len(asked)} times"
            )
        for attention in asked:
            _require_shape(description, network.config.model_type, attention)
            _require_computed(description, network.config.model_type, layer_idx, attention)


@torch.inference_mode()
def _attention_of(network: Network, layer_idx: int, has_kv: bool) -> list[_Attention]:
    """The layer's attention calls; empty if they cannot be recorded on the meta device."""
    asked: list[_Attention] = []
    layer = network.model.layers[layer_idx]
    for name in mlp_names(layer):
        setattr(layer, name, nn.Identity())  # routing to experts needs data
    positions = torch.arange(_NUM_TOKENS, device=_META)[None]
    try:
        hidden = network.embed(positions)
        rope = network.rope(positions, hidden.dtype)
        network.run_layer(layer_idx, hidden, rope, attention_call=asked)
        if has_kv and not asked:
            raise AttributeError("it computes its attention itself")
    except _NEVER_FOR_LACK_OF_NUMBERS as error:
        if not asked:
            family = network.config.model_type
            raise UnusableModel(
                f"family {family} cannot be run layer by layer: {first_line(error)}"
            ) from error
    except Exception:  # a real fault will show when the loaded model is run
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


def _require_computed(
    description: ModelDescription, family: str, layer_idx: int, attention: _Attention
) -> None:
    """Raise UnusableModel unless the layer's attention is what Winnow computes for it."""
    options = {k: v for k, v in attention.options.items() if v is not None}
    layer, most = description.shape.layers[layer_idx], description.max_positions
    asked = min(options.pop("sliding_window", most), most)
    own = layer.window if layer.attention == "sliding" else most
    if asked != own:
        raise UnusableModel(
            f"{description.path}: layer {layer_idx} attends to {asked} of {most} positions, but "
            f"its configuration makes it a {layer} layer that attends to {own}"
        )
    if others := sorted(options.keys() - _WITHOUT_EFFECT - _COMPUTED):
        raise UnusableModel(
            f"{description.path} is a {family}, whose attention Winnow does not compute: layer "
            f"{layer_idx} asks for {', '.join(others)}"
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of one part of the network: its input, and its random output."""

    part: str
    given: Tensor
    answer: Tensor


def require_plain_loop(
    description: ModelDescription,
    network: Any,  # noqa: ANN401
    parts: Network,
) -> None:
    """Raise UnusableModel if the network computes anything else between its parts than they do.

    description: for its sizes.  network: of which `parts` are; unusable afterwards.
    """
    family = network.config.model_type
    calls = _replace_parts(description, parts)
    handed = _handed_to_layers(parts)
    try:
        with torch.inference_mode():
            logits = network(torch.arange(_NUM_TOKENS)[None], use_cache=False).logits
    except Exception:  # a real fault will show when the loaded model is run
        logger.debug("family %s cannot run without its weights", family, exc_info=True)
        return
    for layer_idx, names in handed.items():
        own = {HANDED} if parts.has_temperature(layer_idx) else set()
        if others := sorted(names - _HANDED_ON - own):
            raise UnusableModel(
                f"family {family} hands layer {layer_idx} what Winnow does not: {', '.join(others)}"
            )
    expected = ["embeddings", *(f"layer {i}" for i in range(description.shape.num_layers))]
    expected += ["norm", "head"]
    if [call.part for call in calls] != expected:
        raise UnusableModel(f"family {family} runs its embeddings, layers, norm and head otherwise")
    calls.append(_Call("logits", logits, logits))
    for before, after in pairwise(calls):
        expected_input = _passed_on(before, parts)
        if after.given.shape == expected_input.shape and not after.given.equal(expected_input):
            raise UnusableModel(
                f"family {family} computes something between its {before.part} and its "
                f"{after.part} that Winnow does not"
            )


def _handed_to_layers(network: Network) -> dict[int, set[str]]:
    """The names of what each layer will be called with, by its index."""
    handed: dict[int, set[str]] = {}

    def record(layer_idx: int, options: dict[str, Any]) -> None:
        names = {name for name, value in options.items() if value is not None}
        handed.setdefault(layer_idx, set()).update(names)

    for layer_idx, layer in enumerate(network.model.layers):
        layer.register_forward_pre_hook(
            lambda _, __, options, idx=layer_idx: record(idx, options), with_kwargs=True
        )
    return handed


def _passed_on(call: _Call, network: Network) -> Tensor:
    """What Winnow makes of a part's output."""
    if call.part == "embeddings":
        return network.scales.embedded(call.answer)
    return network.scales.scaled(call.answer) if call.part == "head" else call.answer


def _replace_parts(description: ModelDescription, network: Network) -> list[_Call]:
    """Replace each part's forward with a random output; returns the list that records calls."""
    calls: list[_Call] = []
    shape, body = description.shape, network.model
    random = torch.Generator().manual_seed(0)

    def replace(part: str, module: Any, width: int) -> None:  # noqa: ANN401
        answer = torch.rand((1, _NUM_TOKENS, width), generator=random)

        def forward(*given: Any, **options: Any) -> Tensor:  # noqa: ANN401
            calls.append(_Call(part, given[0] if given else options["hidden_states"], answer))
            return answer

        module.forward = forward

    replace("embeddings", body.embed_tokens, shape.hidden_size)
    for layer_idx, layer in enumerate(body.layers):
        replace(f"layer {layer_idx}", layer, shape.hidden_size)
    replace("norm", body.norm, shape.hidden_size)
    replace("head", network.lm_head, description.vocab_size)
    if body.rotary_emb is not None:
        body.rotary_emb.forward = lambda *_, **__: (torch.zeros(1), torch.zeros(1))
    return calls
