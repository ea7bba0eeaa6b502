"""A model that computes a prompt's layers once, however many settings are tried on it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.attention import AttentionCall, PrefillAttention
from winnow.decoder import DecoderModel
from winnow.layer_state import LayerState
from winnow.rotary import RotaryTables


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What one layer made of all tokens, N of them.

    attention: has its keys and values, if it has any, and the last tokens' queries.
    state: after the last token; None for a layer without.
    hidden: [1, N, hidden_size], after the layer.
    """

    attention: PrefillAttention
    state: LayerState | None
    hidden: Tensor


@dataclass(slots=True, eq=False)
class _Recording:
    """The latest prompt, as far as it was computed with all its tokens."""

    token_ids: Tensor  # [1, N]
    embedded: Tensor
    layers: list[_Layer] = field(default_factory=list)

    def input_of(self, layer_idx: int) -> Tensor | None:
        """The hidden states that go into a layer, if the one before it was recorded."""
        if layer_idx == 0:
            return self.embedded
        return self.layers[layer_idx - 1].hidden if layer_idx <= len(self.layers) else None


class RecordedModel(DecoderModel):
    """Computes as `model` does, except that a prompt given again is not computed again.

    A layer whose input is what the recording has for it is answered from the recording, so that
    the engine's own prefill runs over it under any settings. Layers above a selection have another
    input, and are computed. One prompt is remembered, the latest; the adapter is always the same.
    max_window: the widest observation window that will be asked for.
    """

    def __init__(self, model: DecoderModel, max_window: int) -> None:
        super().__init__(model._model, model.description, model.device, model.shape)
        self.adapters = model.adapters
        self._max_window = max_window
        self._recording: _Recording | None = None

    def embed(self, token_ids: Tensor) -> Tensor:
        """As DecoderModel; one sequence of more than one token is a prompt, and is recorded."""
        if token_ids.shape[0] > 1 or token_ids.shape[1] == 1:
            return super().embed(token_ids)
        known = self._recording
        if known is None or not torch.equal(known.token_ids, token_ids):
            known = self._recording = _Recording(token_ids, super().embed(token_ids))
        return known.embedded

    def layer(
        self,
        layer_idx: int,
        hidden: Tensor,
        rope: RotaryTables,
        attention: AttentionCall,
        state: LayerState | None = None,
    ) -> Tensor:
        known = self._recording
        if known is None or known.input_of(layer_idx) is not hidden:
            return super().layer(layer_idx, hidden, rope, attention, state)
        assert isinstance(attention, PrefillAttention)
        if not attention.looks_at_most_at(self._max_window):
            return super().layer(layer_idx, hidden, rope, attention, state)
        if layer_idx == len(known.layers):
            known.layers.append(self._compute(layer_idx, hidden, rope))
        layer = known.layers[layer_idx]
        if self.shape.layers[layer_idx].has_kv:
            seen = layer.attention
            attention.observe(seen.queries[None], seen.keys[None], seen.values[None], seen.options)
        if state is not None and layer.state is not None:
            state.become(layer.state)
        return layer.hidden

    def _compute(self, layer_idx: int, hidden: Tensor, rope: RotaryTables) -> _Layer:
        attention, state = PrefillAttention(self._max_window), self.new_state(layer_idx)
        output = super().layer(layer_idx, hidden, rope, attention, state)
        return _Layer(attention, state, output)
