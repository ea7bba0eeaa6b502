"""A rank's share of one layer of a prompt: attention of its own heads, and its part of the MLP.

The keys and values of its heads stay with it. Of what it computes rank 0 gets scores, by which it
chooses; what is kept then is the heads' own part of the KV.
"""

import torch
from torch import Tensor

from winnow.adapters.rows import AdapterRows, applied
from winnow.attention import PrefillAttention, ScatteredAttention
from winnow.decoder import DecoderModel
from winnow.distributed.commands import CollectLayer, PackLayer, PrefillLayer, ScoreLayer
from winnow.distributed.exchange import give, give_heads, receive, scatter_heads
from winnow.distributed.heads import Split
from winnow.kv import LayerKV, pack_layer
from winnow.methods.base import LayerView
from winnow.rotary import RotaryTables


class RankPrefill:
    """A follower's side. Between two layers it has hidden states, keys and values of the last."""

    _hidden: Tensor
    _rope: RotaryTables
    _attention: PrefillAttention
    _layer_idx: int

    def __init__(self, model: DecoderModel, split: Split) -> None:
        self._model = model
        self._split = split

    def compute(self, command: PrefillLayer) -> None:
        model, shape = self._model, self._model.shape
        if not command.same_hidden:
            hidden_size = (1, command.num_tokens, shape.hidden_size)
            self._hidden = receive(hidden_size, shape.dtype, model.device)
        if not command.same_positions:
            positions = receive((1, command.num_tokens), torch.int64, model.device)
            self._rope = model.rope(positions)
        gaps = self._rope.positions[0] if command.has_gaps else None
        own = own_attention(model, command, None, gaps)
        with applied(None if command.slot is None else AdapterRows(command.slot)):
            self._hidden = model.layer(command.layer_idx, self._hidden, self._rope, own)
        if isinstance(own, PrefillAttention):
            self._attention, self._layer_idx = own, command.layer_idx

    def score(self, command: ScoreLayer) -> None:
        give_heads(command.score(self._view(command.window_size)))

    def collect(self, command: CollectLayer) -> None:
        give_heads(newest(self._attention, command.num_tokens))

    def pack(self, command: PackLayer) -> LayerKV:
        device = self._model.device
        positions = receive((command.num_tokens,), torch.int32, device)
        tokens = None
        if command.head_lengths is not None:
            tokens = receive((sum(command.head_lengths),), torch.int32, device)
        view = self._view(command.window_size)
        return pack_own(view, self._attention.values, positions, command, tokens, self._split)

    def _view(self, window_size: int) -> LayerView:
        return self._model.view(self._layer_idx, self._attention, window_size)


def pack_own(
    view: LayerView,
    values: Tensor,
    positions: Tensor,
    command: PackLayer,
    tokens: Tensor | None,
    split: Split,
) -> LayerKV:
    """The kept KV of one rank's heads.

    view, values: of its heads.  positions: [num_tokens] int32.
    tokens: the entries to keep of every rank's KV heads, one after another; None: all.
    """
    if tokens is None or command.head_lengths is None:
        return view.pack(values, positions, None)
    own = split.of(command.head_lengths)
    start = sum(command.head_lengths[: split.rank * len(own)])
    kept = torch.split(tokens[start : start + sum(own)].long(), list(own))
    queries = view.kept_queries
    return pack_layer(view.layer_idx, view.keys, values, positions, list(kept), queries)


def give_packed(layer: LayerKV) -> None:
    """Other ranks: the kept KV of their heads, for rank 0."""
    give(torch.stack([layer.keys, layer.values]))
    give(layer.window_queries)


def own_attention(
    model: DecoderModel, command: PrefillLayer, cached: Tensor | None, gaps: Tensor | None
) -> PrefillAttention | ScatteredAttention:
    """The attention of this rank's heads, with their cached keys and values.

    cached: on rank 0 those of all heads, [2, num_kv_heads, num_cached, head_dim].
    gaps: [num_tokens] positions of the tokens, if they have gaps.
    """
    shape = model.shape
    own = None
    if command.num_cached:
        size = (2, shape.num_kv_heads, command.num_cached, shape.head_dim)
        own = torch.empty(size, dtype=shape.dtype, device=model.device)
        scatter_heads(own, cached)
    if command.positions is not None:
        assert own is not None
        return ScatteredAttention(own, command.positions.to(model.device))
    if own is not None:
        own = torch.nn.functional.pad(own, (0, 0, 0, command.num_tokens))
    return PrefillAttention(command.num_queries, own, gaps)


def newest(attention: PrefillAttention, num_tokens: int) -> Tensor:
    """Keys and values of the last tokens: [2, num_kv_heads, num_tokens, head_dim]."""
    return torch.stack([attention.keys[:, -num_tokens:], attention.values[:, -num_tokens:]])
