"""A tiny decoder with windows, and its prefill by formulas with masks by position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.winnow import naive
from tests.winnow.shapes import CHUNKED, SLIDING
from winnow.attention import AttentionCall, AttentionOptions
from winnow.decoder import DecoderModel
from winnow.layer_state import LayerState
from winnow.layers import FULL, Layer
from winnow.model_files import describe_model
from winnow.network import Network
from winnow.pruning_settings import PruningSettings
from winnow.rotary import RotaryTables

LONG = Layer("sliding", 24)
PATTERNS: dict[str, list[Layer]] = {
    "sliding": [SLIDING] * 6,
    "gemma": [SLIDING, FULL] * 3,
    "long windows": [LONG, LONG, FULL] * 2,
    "llama4": [CHUNKED, FULL, CHUNKED, CHUNKED, FULL, CHUNKED],
}
SOFTCAP, SINKS = 3.0, (-1.0, 0.0, 1.0, 2.0)


class WindowedModel(DecoderModel):
    """A checkpoint of plain layers, run with others.

    path: of the checkpoint, or one of the same sizes.  extras: have a softcap and sinks too.
    """

    def __init__(
        self, path: Path, network: Any, layers: Sequence[Layer], *, extras: bool = False
    ) -> None:
        description = describe_model(path)
        shape = replace(description.shape, layers=tuple(layers))
        super().__init__(Network(network), description, torch.device("cpu"), shape)
        self._extras = extras

    def layer(
        self,
        layer_idx: int,
        hidden: Tensor,
        rope: RotaryTables,
        attention: AttentionCall,
        state: LayerState | None = None,
    ) -> Tensor:
        if not self._extras:
            return super().layer(layer_idx, hidden, rope, attention, state)

        def call(
            idx: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
        ) -> Tensor:
            options = replace(options, softcap=SOFTCAP, sinks=torch.tensor(SINKS))
            return attention(idx, query, key, value, options)

        return super().layer(layer_idx, hidden, rope, call, state)


class NaiveAttention:
    """Attention of all tokens of a prompt, at `positions`, in float64 and with a mask for all.

    mass: [H, N], what the last `window` rows give to each token.
    """

    mass: Tensor

    def __init__(self, positions: list[int], window: int) -> None:
        self._positions, self._window = positions, window

    def __call__(
        self, _: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        seen = [
            [options.layer.first_visible(own) <= other <= own for other in self._positions]
            for own in self._positions
        ]
        group = query.shape[1] // key.shape[1]
        keys, values = (part[0].double().repeat_interleave(group, 0) for part in (key, value))
        logits = query[0].double() @ keys.mT * options.scaling  # [H, N, N]
        if options.softcap is not None:
            logits = (logits / options.softcap).tanh() * options.softcap
        weights = logits.exp() * torch.tensor(seen)
        rest = torch.zeros(len(weights)) if options.sinks is None else options.sinks.double().exp()
        weights = weights / (weights.sum(-1, keepdim=True) + rest[:, None, None])
        self.mass = weights[:, -self._window :].sum(1)
        return (weights @ values)[None].to(query.dtype)


@dataclass(frozen=True, slots=True)
class Expected:
    """kept: of each layer and KV head, the positions of its entries."""

    selection_layer: int | None
    rho: list[tuple[int, float]]
    kept: list[list[list[int]]]
    final_hidden: Tensor


@torch.inference_mode()
def prefill_by_formulas(
    model: DecoderModel, token_ids: list[int], settings: PruningSettings
) -> Expected:
    """With `full`, `snapkv` or `asl`."""
    every = list(range(len(token_ids)))
    _, masses, final_hidden = run_layers(model, token_ids, settings, every, None)
    full = model.shape.full_layers
    chosen: Any = None
    if settings.method == "asl" and len(token_ids) > settings.select_tokens:
        latest = settings.latest_layer
        chosen = naive.Asl(
            [naive.as_lists(masses[idx]) for idx in full],
            window=settings.window_size,
            kernel_size=settings.kernel_size,
            select_tokens=settings.select_tokens,
            observed_layers=settings.observed_layers,
            min_layer=next(i for i, idx in enumerate(full) if idx >= settings.min_layer),
            threshold=settings.threshold,
            latest_layer=None if latest is None else full.index(latest),
        )
    is_cut = chosen is not None and chosen.selection_layer is not None
    last = full[chosen.selection_layer] if is_cut else None
    going_on = chosen.kept if is_cut else every
    kept, _, final_hidden = run_layers(model, token_ids, settings, going_on, last)
    rho = [] if chosen is None else [(full[idx], value) for idx, value in chosen.rho]
    return Expected(last, rho, kept, final_hidden)


def run_layers(
    model: DecoderModel,
    token_ids: list[int],
    settings: PruningSettings,
    going_on: list[int],
    selection_layer: int | None,
) -> tuple[list[list[list[int]]], list[Tensor], Tensor]:
    at = list(range(len(token_ids)))
    hidden, masses, kept = model.embed(torch.tensor([token_ids])), [], []
    rope = model.rope(torch.tensor([at]), torch.tensor([token_ids]))
    for layer_idx, layer in enumerate(model.shape.layers):
        attention = NaiveAttention(at, settings.window_size)
        hidden = model.layer(layer_idx, hidden, rope, attention)
        masses.append(attention.mass)
        num_kv_heads = model.shape.sizes[layer_idx].num_kv_heads
        kept.append(
            kept_positions(layer, at, attention.mass, settings, len(token_ids), num_kv_heads)
        )
        if layer_idx == selection_layer:
            at, hidden = [at[idx] for idx in going_on], hidden[:, going_on]
            rope = rope.take(torch.tensor(going_on))
    return kept, masses, hidden[0, -1]


def kept_positions(
    layer: Layer,
    at: list[int],
    mass: Tensor,
    settings: PruningSettings,
    num_tokens: int,
    num_kv_heads: int,
) -> list[list[int]]:
    visible = [
        idx for idx, position in enumerate(at) if position >= layer.first_visible(num_tokens)
    ]
    visible = visible or [len(at) - 1]
    budget = None if settings.method == "full" else settings.kv_budget
    if budget is None or len(visible) <= budget:
        return [[at[idx] for idx in visible]] * num_kv_heads
    kept = naive.snapkv(
        naive.as_lists(mass[:, visible]),
        num_kv_heads,
        settings.window_size,
        settings.kernel_size,
        budget,
    )
    return [[at[visible[idx]] for idx in head] for head in kept]
