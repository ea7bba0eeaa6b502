"""StepForward: one decode step's forward pass, told by the device what to compute."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.adapters.row_slots import RowSlots
from winnow.adapters.rows import AdapterRows, applied
from winnow.attention import AttentionOptions, DecodeBackend, StepAttention
from winnow.decoder import DecoderModel
from winnow.engine.kv_pool import KVPool

UNREAD = -1  # in the place of a token that only the device knows


@dataclass(frozen=True, slots=True, eq=False)
class LayerOutputs:
    """What the layers computed for B rows.

    hidden: [B, hidden_size] after the last layer.  queries: each layer's [B, num_heads, key_dim].
    options: how each layer attended.  logits: [B, vocab_size] float32; None if not computed yet.
    """

    hidden: Tensor
    queries: list[Tensor]
    options: list[AttentionOptions]
    logits: Tensor | None = None

    def first(self, count: int) -> "LayerOutputs":
        """Those of the first rows."""
        return LayerOutputs(
            self.hidden[:count],
            [queries[:count] for queries in self.queries],
            self.options,
            None if self.logits is None else self.logits[:count],
        )


class StepForward:
    """Feeds each row's last token through all layers; the host neither waits nor looks.

    newest: [num_rows + 1] int64, the token that was sampled last for each row.
    slots: of the rows' adapters; None if the model takes none.
    """

    def __init__(self, model: DecoderModel, pool: KVPool, backend: DecodeBackend[Any]) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        num_rows = pool.mirror.dummy_row + 1
        self.newest = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        self.slots: RowSlots | None = None
        if model.adapters is not None:
            room = model.adapters.room
            self.slots = RowSlots(num_rows, room.max_adapters, model.device)

    def empty_dummy(self) -> None:
        """Take away what steps have added to the dummy row."""
        self._pool.mirror.empty_dummy()
        self._pool.states.empty_dummy()

    def __call__(
        self, inputs: Tensor, longest: list[int] | None = None, own_rows: list[int] | None = None
    ) -> LayerOutputs:
        """Run a step that the pool has begun.

        inputs: [3, B] int64: rows, positions of their last tokens (with LONG for long tables), and
        these tokens, UNREAD to use `newest`.  longest: see StepPlan.  own_rows: the rows; None
        where only the device knows.
        """
        rows, positions, tokens = inputs
        model = self._model
        tokens = torch.where(tokens == UNREAD, self.newest[rows], tokens)
        hidden = model.embed(tokens[:, None])
        rope = model.rope(positions[:, None], tokens[:, None])
        plan = self._pool.plan_step(rows, rope.positions[:, 0], longest)
        attention = StepAttention(self._backend, plan, self._pool.shape)
        states = self._pool.states
        with applied(self._adapter_rows(rows, own_rows)):
            for layer_idx in range(model.shape.num_layers):
                state = states.gather(rows, layer_idx)
                hidden = model.layer(layer_idx, hidden, rope, attention, state)
                if state is not None:
                    states.scatter(rows, layer_idx, state)
        return LayerOutputs(hidden[:, 0], attention.queries, attention.options)

    def _adapter_rows(self, rows: Tensor, own_rows: list[int] | None) -> AdapterRows | None:
        if self.slots is None:
            return None
        return self.slots.of(rows) if own_rows is None else self.slots.of_launched(own_rows, rows)
