"""What pruning saves by kind of layer, computed from shapes: `python -m benchmarks.savings`.

For a model whose layers are all full, one with sliding layers and one with recurrent ones, in the
sizes of real ones: the operations of a prompt's prefill, and the bytes of keys, values and states
that it ships, unpruned and with the default settings. No weights are needed: sizes are those that
engines reserve memory by. tests/benchmarks/test_savings.py compares them with what small models of
the same kinds report.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from benchmarks.report import arguments, show, write_json
from winnow.defaults import scaled_defaults
from winnow.kv import ModelShape
from winnow.layer_state import LayerState, StatePart
from winnow.layers import Layer
from winnow.model_files import shape_of
from winnow.pruning_settings import PruningSettings

LENGTHS = (32_768, 131_072)
MIB, TERA = 2**20, 1e12
_META = torch.device("meta")
_OPERATIONS_PER_STATE_NUMBER = 6  # a token decays it, adds to it and reads it
_POSITIONS: dict[str, Any] = {"max_position_embeddings": 2 * LENGTHS[-1]}
SHAPES: dict[str, PreTrainedConfig] = {
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, **_POSITIONS,
    ),
    "Gemma-3-12B": Gemma3TextConfig(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, sliding_window=1024, **_POSITIONS,
    ),
    "Qwen3.5-9B": Qwen3_5TextConfig(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16,
        num_key_value_heads=4, head_dim=256, **_POSITIONS,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape, and the numbers of each layer's matrices."""

    shape: ModelShape
    layer_weights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Of one layer in the prefill of one prompt.

    num_tokens: that it computes.  num_entries: the most keys and values that a head ships.
    """

    layer: Layer
    num_tokens: int
    num_entries: int
    operations: float
    kv_bytes: int
    state_bytes: int


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Model:
    """From a configuration alone; its network has no data."""
    with _META:
        network: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shape = shape_of(config, dtype, config.max_position_embeddings)
    states = (_states(network, idx, layer) for idx, layer in enumerate(shape.layers))
    layer_weights = (
        sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
        for layer in network.model.layers
    )
    return Model(replace(shape, states=tuple(states)), tuple(layer_weights))


@torch.inference_mode()
def _states(
    network: Any,  # noqa: ANN401
    layer_idx: int,
    layer: Layer,
) -> tuple[StatePart, ...]:
    """A layer's state, seen where a token has gone through it."""
    state, body = LayerState(), network.model
    if layer.is_recurrent:
        token = torch.zeros((1, 1), dtype=torch.int64, device=_META)
        hidden = body.embed_tokens(token)
        table = body.rotary_emb(hidden, token)
        body.layers[layer_idx](hidden, position_embeddings=table, past_key_values=state)
    return state.parts


def prefill_costs(
    model: Model, settings: PruningSettings, num_tokens: int, cut_layer: int | None
) -> list[LayerCost]:
    """Of each layer, if the prompt is cut after `cut_layer`; None: it is not cut."""
    costs = []
    for layer_idx, layer in enumerate(model.shape.layers):
        is_above = cut_layer is not None and layer_idx > cut_layer
        computed = min(settings.select_tokens, num_tokens) if is_above else num_tokens
        costs.append(_layer_cost(model, settings, layer_idx, layer, num_tokens, computed))
    return costs


def _layer_cost(
    model: Model,
    settings: PruningSettings,
    layer_idx: int,
    layer: Layer,
    num_tokens: int,
    computed: int,
) -> LayerCost:
    shape = model.shape
    most = settings.max_prompt_entries(num_tokens, shape.num_kv_heads)
    num_entries = min(layer.num_kept(num_tokens), computed, most)
    state_numbers = sum(prod(part.shape) for part in shape.states[layer_idx])
    per_token = 2 * model.layer_weights[layer_idx] + _OPERATIONS_PER_STATE_NUMBER * state_numbers
    per_pair = 4 * shape.num_heads * shape.head_dim
    return LayerCost(
        layer,
        num_tokens=computed,
        num_entries=num_entries,
        operations=per_token * computed + per_pair * _num_pairs(layer, computed),
        kv_bytes=shape.kv_bytes(num_entries * shape.num_kv_heads),
        state_bytes=sum(part.nbytes for part in shape.states[layer_idx]),
    )


@cache
def _num_pairs(layer: Layer, num_tokens: int) -> int:
    """Queries with keys that they see, of so many tokens without gaps between them."""
    if layer.attention is None:
        return 0
    return sum(position + 1 - layer.first_visible(position) for position in range(num_tokens))


def savings(name: str, model: Model, num_tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each kind of layer, and one for all."""
    pruned = scaled_defaults(model.shape)
    cuts = sorted({pruned.min_layer, pruned.latest_layer or pruned.min_layer})
    whole = prefill_costs(model, replace(pruned, method="full"), num_tokens, None)
    by_cut = [prefill_costs(model, pruned, num_tokens, cut) for cut in (cuts[0], cuts[-1])]
    kinds = sorted({str(cost.layer) for cost in whole})
    for kind in [*kinds, "all"] if len(kinds) > 1 else kinds:
        own = [idx for idx, cost in enumerate(whole) if kind in (str(cost.layer), "all")]
        before, early, late = ([costs[idx] for idx in own] for costs in (whole, *by_cut))
        operations = sum(cost.operations for cost in before)
        shares = [sum(cost.operations for cost in costs) / operations for costs in (early, late)]
        yield {
            "model": name,
            "tokens": num_tokens,
            "layers": f"{len(own)} {kind}",
            "prefill, TFLOP": operations / TERA,
            f"cut after {cuts[0]}": shares[0],
            f"cut after {cuts[-1]}": shares[1],
            "KV shipped, MiB": sum(cost.kv_bytes for cost in before) / MIB,
            "KV, pruned": sum(cost.kv_bytes for cost in late) / MIB,
            "states, MiB": sum(cost.state_bytes for cost in before) / MIB,
        }


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    args = parser.parse_args()
    found = []
    for name, config in SHAPES.items():
        model = model_of(config)
        for num_tokens in LENGTHS[:1] if args.quick else LENGTHS:
            own = list(savings(name, model, num_tokens))
            show(f"{name}'s shape, {num_tokens:,} tokens", own)
            found += own
    write_json(args.json, "savings", found)


if __name__ == "__main__":
    main()
