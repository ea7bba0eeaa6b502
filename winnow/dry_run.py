"""Checks, without weights, that a network can be run layer by layer.

The network's own forward runs with its parts replaced by random outputs, to detect anything that it
computes between them. Then the layers run once on torch's meta device, to record the attention that
they request.
"""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from winnow.folder_errors import cannot_run, first_line
from winnow.kv import ModelShape
from winnow.model_files import ModelDescription
from winnow.network import Network
from winnow.network_parts import mlp_names

logger = logging.getLogger(__name__)

RECORDER = "winnow-recorder"  # attention implementation of networks that are checked here
ONE_BY_ONE = "its layers cannot be run one by one"
OWN_ATTENTION = "it computes its attention itself, and Winnow's cannot take its place"

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
    "shared_kv_states",
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

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


_asked: ContextVar[list[_Attention]] = ContextVar("attention calls of a layer")


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # noqa: ANN401 - a family's own
) -> tuple[Tensor, None]:
    # Some families' windows are in their masks alone.
    window = options.pop("sliding_window", getattr(module, "sliding_window", None))
    options |= {"attention_mask": attention_mask, "sliding_window": window}
    asked = _Attention(query, key, value, options)
    _asked.get().append(asked)
    batch, num_heads, num_tokens, _ = query.shape
    return query.new_empty((batch, num_tokens, num_heads, value.shape[3])), None


AttentionInterface.register(RECORDER, _record)


def require_known_attention(description: ModelDescription, network: Network) -> None:
    family = network.config.model_type
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for layer_idx in range(description.shape.num_layers):
        has_kv = description.shape.layers[layer_idx].has_kv
        asked = _attention_of(network, layer_idx, has_kv, shared)
        if len(asked) > 1:
            raise cannot_run(family, f"layer {layer_idx} attends {len(asked)} times, not once")
        for attention in asked:
            require_sizes(family, description.shape, layer_idx, attention.tensors)
            _require_computed(description, family, layer_idx, attention)


@torch.inference_mode()
def _attention_of(
    network: Network, layer_idx: int, has_kv: bool, shared: dict[str, tuple[Tensor, Tensor]]
) -> list[_Attention]:
    """The layer's attention calls; empty if they cannot be recorded on the meta device.

    shared: as in TokenExtras, of the layers before.
    """
    family = network.config.model_type
    asked: list[_Attention] = []
    _asked.set(asked)
    layer = network.model.layers[layer_idx]
    for name in mlp_names(layer):
        setattr(layer, name, nn.Identity())  # routing to experts needs data
    positions = torch.arange(_NUM_TOKENS, device=_META)[None]
    try:
        hidden = network.embed(positions)
        rope = network.rope(positions, hidden.dtype, positions)
        if rope.extras is not None:
            rope = replace(rope, extras=replace(rope.extras, shared=shared))
        network.run_layer(layer_idx, hidden, rope)
    except _NEVER_FOR_LACK_OF_NUMBERS as error:
        if not asked:
            raise cannot_run(family, f"{ONE_BY_ONE}: {first_line(error)}") from error
    except Exception:  # a real fault will show when the loaded model is run
        logger.debug("layer %d cannot run on the meta device", layer_idx, exc_info=True)
    else:
        if has_kv and not asked:
            raise cannot_run(family, OWN_ATTENTION)
    return asked


def require_sizes(
    family: str, shape: ModelShape, layer_idx: int, tensors: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Raise UnusableModel unless an attention call's tensors are those of the layer's shape.

    tensors: queries, keys and values, each [B, heads, tokens, numbers].
    """
    size = shape.sizes[layer_idx]
    key, value = (size.num_kv_heads, size.key_dim), (size.num_kv_heads, size.value_dim)
    wanted = ((shape.num_heads, size.key_dim), key, value)
    if tuple((part.shape[1], part.shape[3]) for part in tensors) != wanted:
        sizes = ", ".join(f"{part.shape[1]} x {part.shape[3]}" for part in tensors)
        raise cannot_run(
            family,
            f"its queries, keys and values (heads x numbers) of layer {layer_idx} are {sizes}; by "
            "its configuration they would be "
            + ", ".join(f"{heads} x {numbers}" for heads, numbers in wanted),
        )


def _require_computed(
    description: ModelDescription, family: str, layer_idx: int, attention: _Attention
) -> None:
    """Raise UnusableModel unless the layer's attention is what Winnow computes for it."""
    options = {k: v for k, v in attention.options.items() if v is not None}
    layer, most = description.shape.layers[layer_idx], description.max_positions
    asked = min(options.pop("sliding_window", most), most)
    own = most if layer.attention != "sliding" else min(layer.window or most, most)
    if asked != own:
        raise cannot_run(
            family,
            f"layer {layer_idx} attends to {asked} of {most} positions, but its configuration "
            f"makes it a {layer} layer that attends to {own}",
        )
    if "attention_mask" in options:
        raise cannot_run(family, f"layer {layer_idx} chooses by itself what it attends to")
    if others := sorted(options.keys() - _WITHOUT_EFFECT - _COMPUTED):
        raise cannot_run(
            family, f"layer {layer_idx} asks its attention for {', '.join(others)} besides"
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of one part of the network: its input, what it gets besides, and its random output."""

    part: str
    given: Tensor
    answer: Tensor
    besides: tuple[Tensor, ...] = ()
    names: frozenset[str] = frozenset()  # of what it gets besides


def require_plain_loop(
    description: ModelDescription,
    network: Any,  # noqa: ANN401
    parts: Network,
) -> None:
    """Raise UnusableModel if the network computes anything else between its parts than they do.

    description: for its sizes.  network: of which `parts` are.
    """
    family = network.config.model_type
    logits = None
    with torch.inference_mode(), _replaced(description, parts) as calls:
        try:
            logits = network(torch.arange(_NUM_TOKENS)[None], use_cache=False).logits
        except Exception:  # a real fault will show when the loaded model is run
            logger.debug("family %s cannot run without its weights", family, exc_info=True)
    if any(_is(one, calls[0].answer) for call in calls[1:] for one in call.besides):
        raise cannot_run(family, "its layers take the embeddings besides the layer before's output")
    for call in calls:
        if call.part.startswith("layer"):
            own = parts.handed_names(int(call.part.removeprefix("layer ")))
            if others := sorted(call.names - _HANDED_ON - own):
                raise cannot_run(family, f"it hands {call.part} {', '.join(others)} besides")
    if logits is None:
        return
    expected = ["embeddings", *(f"layer {i}" for i in range(description.shape.num_layers))]
    expected += ["norm", "head"]
    if [call.part for call in calls] != expected:
        raise cannot_run(family, "it runs its embeddings, layers, norm and head in another order")
    calls.append(_Call("logits", logits, logits))
    for before, after in pairwise(calls):
        expected_input = _passed_on(before, parts)
        if after.given.shape == expected_input.shape and not after.given.equal(expected_input):
            raise cannot_run(
                family,
                f"it computes something between its {before.part} and its {after.part} that "
                "Winnow does not",
            )


def _is(one: Tensor, other: Tensor) -> bool:
    same_kind = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same_kind and one.equal(other)


def _passed_on(call: _Call, network: Network) -> Tensor:
    """What Winnow makes of a part's output."""
    if call.part == "embeddings":
        return network.scales.embedded(call.answer)
    return network.scales.scaled(call.answer) if call.part == "head" else call.answer


@contextlib.contextmanager
def _replaced(description: ModelDescription, network: Network) -> Iterator[list[_Call]]:
    """Within it, each part's forward is replaced with a random output; calls go to the list."""
    calls: list[_Call] = []
    replaced: list[Any] = []
    shape, body = description.shape, network.model
    random = torch.Generator().manual_seed(0)

    def replace(part: str, module: Any, width: int) -> None:  # noqa: ANN401
        answer = torch.rand((1, _NUM_TOKENS, width), generator=random)

        def forward(*given: Any, **options: Any) -> Tensor:  # noqa: ANN401
            first = given[0] if given else options.pop("hidden_states")
            others = (*given[1:], *options.values())
            besides = tuple(one for one in others if isinstance(one, Tensor))
            names = frozenset(name for name, one in options.items() if one is not None)
            calls.append(_Call(part, first, answer, besides, names))
            return answer

        module.forward = forward
        replaced.append(module)

    replace("embeddings", body.embed_tokens, shape.hidden_size)
    for layer_idx, layer in enumerate(body.layers):
        replace(f"layer {layer_idx}", layer, shape.hidden_size)
    replace("norm", body.norm, shape.hidden_size)
    replace("head", network.lm_head, description.vocab_size)
    if body.rotary_emb is not None:
        body.rotary_emb.forward = lambda *_, **__: (torch.zeros(1), torch.zeros(1))
        replaced.append(body.rotary_emb)
    try:
        yield calls
    finally:
        for module in replaced:
            del module.forward
