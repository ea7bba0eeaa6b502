"""A decoder of transformers, taken apart: embeddings, rotary tables, layers, norm and head."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from winnow.attention.calls import AttentionCall
from winnow.folder_errors import cannot_run
from winnow.long_rope import LongRope, has_long_rope
from winnow.network_parts import (
    body_of,
    final_norm,
    has_added_positions,
    layers_of_body,
    rotary_of,
)
from winnow.network_scales import scales_of
from winnow.rotary import LONG, RotaryTables, Table
from winnow.temperature import HANDED, take_temperature, with_factors
from winnow.token_extras import LayerInputs, TokenExtras, layer_inputs_of, sharing_kinds

_ANY_LAYER = "any"  # the kind of table of families that have only one


class Body(nn.Module):
    """The parts below the head.  rotary_emb: None if the layers make tables themselves."""

    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any
    layer_inputs: LayerInputs | None


class Network(nn.Module):
    """The parts by Llama's names, whatever the family calls them; they are the network's own.

    Raises UnusableModel for a network without one of them, or with positions in its embeddings.
    """

    lm_head: Any

    def __init__(self, network: Any) -> None:  # noqa: ANN401 - each family has its own class
        super().__init__()
        self.config: Any = network.config
        body = body_of(network)
        parts = {
            "embeddings": network.get_input_embeddings(),
            "layers": layers_of_body(body),
            "norm": final_norm(body),
            "head": network.get_output_embeddings(),
        }
        family = self.config.model_type
        if has_added_positions(body):
            raise cannot_run(family, "it adds positions to its embeddings")
        if missing := [name for name, part in parts.items() if part is None]:
            raise cannot_run(
                family,
                f"it is not embeddings, layers, a norm and a head: Winnow finds no "
                f"{' and no '.join(missing)} in it",
            )
        self.model = Body()
        self.model.embed_tokens, self.model.layers, self.model.norm, self.lm_head = parts.values()
        self.model.rotary_emb = rotary_of(body)
        if has_long_rope(self.config):
            self.model.rotary_emb = LongRope(self.model.rotary_emb, self.config)
        self.scales = scales_of(self.config)
        self._table_kinds = self._kinds()
        tables = self._kinds_with_tables()
        self._temperatures = [
            take_temperature(body, layer, has_table=kind in tables)
            for layer, kind in zip(self.model.layers, self._table_kinds, strict=True)
        ]
        self.model.layer_inputs = layer_inputs_of(body, len(self.model.layers))
        self.sharing_kinds = sharing_kinds(self.config)

    def _kinds(self) -> list[str]:
        """The kind of rotary table of each layer."""
        rotary = self.model.rotary_emb
        if rotary is None or "layer_type" not in inspect.signature(rotary.forward).parameters:
            return [_ANY_LAYER] * len(self.model.layers)
        return list(self.config.layer_types)

    def _kinds_with_tables(self) -> list[str]:
        rotary, kinds = self.model.rotary_emb, dict.fromkeys(self._table_kinds)
        if rotary is None:
            return []
        known = kinds if _ANY_LAYER in kinds else getattr(rotary, "layer_types", kinds)
        own = getattr(self.config, "rope_parameters", None) or {}
        return [kind for kind in kinds if kind in known and own.get(kind, True) is not None]

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: [B, T] int64.  Returns hidden states [B, T, hidden_size]."""
        return self.scales.embedded(self.model.embed_tokens(token_ids))

    def rope(
        self, positions: Tensor, dtype: torch.dtype, token_ids: Tensor | None = None
    ) -> RotaryTables:
        """Tables of this dtype for the positions [B, T] int64, with LONG added for long ones.

        token_ids: [B, T] of the tokens there, without which `extras` are not complete.
        """
        return replace(self._tables(positions, dtype), extras=self._extras(token_ids))

    def _extras(self, token_ids: Tensor | None) -> TokenExtras | None:
        inputs = self.model.layer_inputs
        if inputs is None:
            return TokenExtras() if self.sharing_kinds else None
        assert token_ids is not None, "layers take inputs of each token's own"
        return TokenExtras(inputs(token_ids, self.embed(token_ids)))

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> RotaryTables:
        rotary = self.model.rotary_emb
        if rotary is None:
            return RotaryTables(positions, {})
        like = torch.empty(0, dtype=dtype, device=positions.device)
        if isinstance(rotary, LongRope):
            tables = {_ANY_LAYER: rotary(like, positions)}
            return RotaryTables(positions % LONG, tables, positions)
        by_kind = {
            kind: rotary(like, positions, *([] if kind == _ANY_LAYER else [kind]))
            for kind in self._kinds_with_tables()
        }
        return RotaryTables(positions, by_kind)

    def table(self, layer_idx: int, rope: RotaryTables) -> Table | None:
        """The one of a layer; None for a kind of layer without."""
        return rope.by_kind.get(self._table_kinds[layer_idx])

    def tempered(
        self, layer_idx: int, rope: RotaryTables, attention: AttentionCall
    ) -> AttentionCall:
        """The attention with the layer's temperature for the tokens of `rope`, if it has one."""
        temperature = self._temperatures[layer_idx]
        return (
            attention
            if temperature is None
            else with_factors(attention, temperature(rope.positions))
        )

    def handed_names(self, layer_idx: int) -> frozenset[str]:
        """What of a layer's own it is handed, or computed for it, by transformers' names."""
        names = [HANDED] if self._temperatures[layer_idx] is not None else []
        return frozenset(names + ["per_layer_input"] * (self.model.layer_inputs is not None))

    def run_layer(
        self,
        layer_idx: int,
        hidden: Tensor,
        rope: RotaryTables,
        **options: Any,  # noqa: ANN401
    ) -> Tensor:
        """One of transformers' layers.  hidden and the result: [B, T, hidden_size].

        options: of the family's layers, besides.
        """
        if rope.by_kind:
            options["position_embeddings"] = self.table(layer_idx, rope)
        if rope.extras is not None:
            options.update(rope.extras.options(layer_idx))
        layer = self.model.layers[layer_idx]
        output = layer(hidden, attention_mask=None, position_ids=rope.positions, **options)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def head_outputs(self, hidden: Tensor) -> Tensor:
        """Final norm and head; `scales` make logits of them.  hidden: [B, hidden_size]."""
        return self.lm_head(self.model.norm(hidden))  # type: ignore[no-any-return]
