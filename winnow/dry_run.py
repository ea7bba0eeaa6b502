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

logger = logging.getLogger(__name__)

RECORDER = "winnow-recorder"  # attention implementation of networks that are checked here

_META = torch.device("meta")
_PARTS = ("embed_tokens", "rotary_emb", "layers", "norm")
_NUM_TOKENS = 4
# Options that layers pass to their attention without changing its result.
_WITHOUT_EFFECT = {"scaling", "dropout", "position_ids", "use_cache", "cache_position"}
_NEVER_FOR_LACK_OF_NUMBERS = (TypeError, AttributeError, KeyError)


def require_decoder(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel unless the network has the parts that Winnow runs."""
    body: Any = getattr(network, "model", None)
    missing = [part for part in _PARTS if not hasattr(body, part)]
    missing += [] if hasattr(network, "lm_head") else ["lm_head"]
    missing += [] if missing or all(hasattr(layer, "mlp") for layer in body.layers) else ["mlp"]
    if missing:
        raise UnusableModel(
            f"{description.path} is a {network.config.model_type}, which Winnow cannot run layer "
            f"by layer: it has no {', '.join(missing)}"
        )


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
    attention_call: list[_Attention],
    **options: Any,  # noqa: ANN401 - a family's own
) -> tuple[Tensor, None]:
    asked = _Attention(query, key, value, options | {"attention_mask": attention_mask})
    attention_call.append(asked)
    return query.new_empty((*query.shape[:3], value.shape[3])).transpose(1, 2), None


AttentionInterface.register(RECORDER, _record)


def require_known_attention(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    for layer_idx in range(description.shape.num_layers):
        for attention in _attention_of(network, layer_idx):
            _require_shape(description, network.config.model_type, attention)
            _require_plain(description, network.config.model_type, layer_idx, attention)


@torch.inference_mode()
def _attention_of(network: Any, layer_idx: int) -> list[_Attention]:  # noqa: ANN401
    """The layer's attention calls; empty if they cannot be recorded on the meta device."""
    asked: list[_Attention] = []
    layer = network.model.layers[layer_idx]
    layer.mlp = nn.Identity()  # routing to experts needs data
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


def _require_plain(
    description: ModelDescription, family: str, layer_idx: int, attention: _Attention
) -> None:
    """Raise UnusableModel unless it is plain scaled dot-product attention to the whole prompt."""
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


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of one part of the network: its input, and its random output."""

    part: str
    given: Tensor
    answer: Tensor


def require_plain_loop(description: ModelDescription, network: Any) -> None:  # noqa: ANN401
    """Raise UnusableModel if the network computes anything between its parts.

    description: for its sizes.  network: unusable afterwards.
    """
    family = network.config.model_type
    calls = _replace_parts(description, network)
    try:
        with torch.inference_mode():
            logits = network(torch.arange(_NUM_TOKENS)[None], use_cache=False).logits
    except Exception:  # a real fault will show when the loaded model is run
        logger.debug("family %s cannot run without its weights", family, exc_info=True)
        return
    expected = ["embeddings", *(f"layer {i}" for i in range(description.shape.num_layers))]
    expected += ["norm", "head"]
    if [call.part for call in calls] != expected:
        raise UnusableModel(f"family {family} runs its embeddings, layers, norm and head otherwise")
    calls.append(_Call("logits", logits, logits))
    for before, after in pairwise(calls):
        if after.given.shape == before.answer.shape and not after.given.equal(before.answer):
            raise UnusableModel(
                f"family {family} computes something between its {before.part} and its "
                f"{after.part} that Winnow does not"
            )


def _replace_parts(description: ModelDescription, network: Any) -> list[_Call]:  # noqa: ANN401
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
    body.rotary_emb.forward = lambda *_, **__: (torch.zeros(1), torch.zeros(1))
    return calls
