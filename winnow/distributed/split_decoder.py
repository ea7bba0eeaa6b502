"""Rank 0's model for prefill: whole to whoever runs prompts through it, computed by all ranks.

Every rank computes the attention of its heads, and keeps their keys and values (split_view.py).
"""

import weakref

import torch
from torch import Tensor

from winnow.adapters.rows import applied_rows
from winnow.attention import AttentionCall, PrefillAttention, ScatteredAttention
from winnow.decoder import DecoderModel
from winnow.distributed.commands import CollectLayer, PrefillLayer
from winnow.distributed.exchange import gather_heads, share
from winnow.distributed.rank_prefill import newest, own_attention
from winnow.distributed.ranks import Ranks
from winnow.distributed.split_head import SplitHead
from winnow.distributed.split_view import SplitView
from winnow.layer_state import LayerState
from winnow.rotary import RotaryTables


class SplitDecoder(DecoderModel):
    """own: rank 0's share of the model. A PrefillAttention gets the entries of its heads alone."""

    def __init__(self, own: DecoderModel, ranks: Ranks) -> None:
        super().__init__(own._model, own.description, own.device)
        self.adapters = own.adapters
        self._own = own
        self._ranks = ranks
        self._head = SplitHead(own, ranks)
        self._shared_hidden: weakref.ref[Tensor] | None = None  # which the other ranks have
        self._shared_positions: weakref.ref[Tensor] | None = None

    @torch.inference_mode()
    def layer(
        self,
        layer_idx: int,
        hidden: Tensor,
        rope: RotaryTables,
        attention: AttentionCall,
        state: LayerState | None = None,
    ) -> Tensor:
        assert state is None, "the model has no recurrent layers"
        assert isinstance(attention, PrefillAttention | ScatteredAttention)
        with self._ranks.in_step():
            asked = rope.positions if rope.asked is None else rope.asked
            command = self._tell(layer_idx, hidden, asked, attention)
            cached = attention.cached
            if cached is not None:
                cached = cached[:, :, : command.num_cached]
            gaps = attention.positions if command.has_gaps else None
            own = own_attention(self._own, command, cached, gaps)
            output = self._own.layer(layer_idx, hidden, rope, own)
            if isinstance(attention, PrefillAttention):
                assert isinstance(own, PrefillAttention)
                attention.keys, attention.values = own.keys, own.values
                attention.queries, attention.options = own.queries, own.options
        self._shared_hidden = weakref.ref(output)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head.logits(hidden)

    def _tell(
        self,
        layer_idx: int,
        hidden: Tensor,
        positions: Tensor,
        attention: PrefillAttention | ScatteredAttention,
    ) -> PrefillLayer:
        """Have the other ranks compute the layer too; they get what they do not have."""
        num_tokens, cached = hidden.shape[1], attention.cached
        rows = applied_rows()
        scattered = isinstance(attention, ScatteredAttention)
        num_keys = 0 if cached is None else cached.shape[2]
        command = PrefillLayer(
            layer_idx=layer_idx,
            num_tokens=num_tokens,
            num_cached=num_keys if scattered else max(0, num_keys - num_tokens),
            same_hidden=_is(self._shared_hidden, hidden),
            same_positions=_is(self._shared_positions, positions),
            has_gaps=not scattered and attention.positions is not None,
            num_queries=attention.num_queries if isinstance(attention, PrefillAttention) else None,
            positions=attention.positions.cpu()
            if isinstance(attention, ScatteredAttention)
            else None,
            slot=None if rows is None else rows.slot,
        )
        self._ranks.tell(command)
        if not command.same_hidden:
            share(hidden)
        if not command.same_positions:
            share(positions)
            self._shared_positions = weakref.ref(positions)
        return command

    def view(self, layer_idx: int, attention: PrefillAttention, window_size: int) -> SplitView:
        own = super().view(layer_idx, attention, window_size)
        return SplitView(
            layer_idx,
            own.keys,
            own.queries,
            own.options,
            window_size,
            own.positions,
            own=own,
            ranks=self._ranks,
        )

    @torch.inference_mode()
    def newest_entries(self, attention: PrefillAttention, num_tokens: int) -> tuple[Tensor, Tensor]:
        with self._ranks.in_step():
            self._ranks.tell(CollectLayer(num_tokens))
            keys, values = gather_heads(newest(attention, num_tokens), dim=1)
        return keys, values


def _is(shared: "weakref.ref[Tensor] | None", tensor: Tensor) -> bool:
    return shared is not None and shared() is tensor
