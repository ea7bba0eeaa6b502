"""ModelRunner: the forward pass of one decode batch, and sampling of each next token.

Neither waits for the device: a step is launched, and its tokens are read from it later.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from winnow.attention import AttentionOptions
from winnow.decoder import DecoderModel
from winnow.engine.sequence import Sequence
from winnow.engine.step_forward import UNREAD, LayerOutputs
from winnow.engine.step_runner import StepRunner
from winnow.engine.token_masks import MaskRow, MaskWorker
from winnow.errors import WinnowError
from winnow.rotary import LONG
from winnow.sampling import Sampled, SampledBatch, sample_batch
from winnow.sampling.masks import TokenMasks
from winnow.to_device import indices_to_device


@dataclass(frozen=True, slots=True, eq=False)
class StepQueries:
    """The queries that a forward pass computed for its sequences.

    layers: each layer's [B, num_heads, key_dim], valid until the next step is launched.
    options: how each layer attended.
    """

    sequences: list[Sequence]
    layers: list[Tensor]
    options: list[AttentionOptions]


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedStep:
    """A step on the device's queue.

    drawn: the sequences whose token is sampled; None for their tokens if there are none.
    replayed: the tokens of the others.  queries: None if no layer is computed.
    failed: the sequences whose grammar cannot tell what may come.
    """

    sequences: list[Sequence]
    drawn: list[Sequence]
    sampled: SampledBatch | None
    replayed: dict[Sequence, int]
    queries: StepQueries | None
    failed: dict[Sequence, WinnowError]

    def read(self) -> dict[Sequence, Sampled | WinnowError]:
        """The next token of every sequence, or its error.  May be called again.

        Waits for the device, but not for what was launched after.  Raises RuntimeError if the
        device fails; no sequence's KV can be trusted then.
        """
        sampled = self.sampled.read() if self.sampled else []
        replayed = {seq: Sampled(token_id) for seq, token_id in self.replayed.items()}
        return {**replayed, **dict(zip(self.drawn, sampled, strict=True)), **self.failed}


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """What the layers computed for `sequences`, whose rows are also on the device: [B]."""

    sequences: list[Sequence]
    rows: Tensor
    outputs: LayerOutputs

    @property
    def queries(self) -> StepQueries:
        return StepQueries(self.sequences, self.outputs.queries, self.outputs.options)


class ModelRunner:
    """Runs batches of sequences by `steps`."""

    def __init__(self, model: DecoderModel, steps: StepRunner) -> None:
        self.model = model
        self._steps = steps
        self._masks = MaskWorker(model.vocab_size)

    @property
    def reads_late(self) -> bool:
        """Whether a step should be launched before the tokens of the last one are read."""
        return self._steps.replays

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], unread: LaunchedStep | None = None) -> LaunchedStep:
        """Have the device compute the next token of every sequence.

        unread: the step before, if its tokens have not been taken. Sequences with a grammar wait
        for them, but after the layers are on the device's queue.
        Raises RuntimeError if the device fails; no sequence's KV can be trusted then.
        """
        going = [seq for seq in batch if seq.final_hidden is None]
        joining = [seq for seq in batch if seq.final_hidden is not None]
        next_replayed = [(seq, seq.next_replayed) for seq in [*going, *joining]]
        drawn = [seq for seq, token_id in next_replayed if token_id is None]
        masks = self._masks.begin(_mask_rows(drawn))
        computed = self._compute(going) if going else None
        if unread is not None and any(one.sampling.needs_token for one in drawn):
            masks += self._masks.begin(_mask_rows(drawn, self.read(unread)))
        allowed = TokenMasks.joined([part.result() for part in masks])
        sampled = self._sample(drawn, computed, allowed) if drawn else None
        for seq in batch:
            seq.final_hidden = None
            seq.sampling.num_unread += 1
        return LaunchedStep(
            batch,
            drawn,
            sampled,
            {seq: token_id for seq, token_id in next_replayed if token_id is not None},
            computed.queries if computed else None,
            _failures(drawn),
        )

    def read(self, launched: LaunchedStep) -> dict[Sequence, Sampled | WinnowError]:
        """See LaunchedStep."""
        return launched.read()

    def close(self) -> None:
        """End its thread and let go of recorded steps; none may be launched any more."""
        self._masks.close()
        self._steps.close()

    def _compute(self, going: list[Sequence]) -> Computed:
        """Feed each sequence's last token through all layers."""
        rows = [seq.row for seq in going]
        positions = [self._rotary_position(seq) for seq in going]
        tokens = [UNREAD if seq.newest_token is None else seq.newest_token for seq in going]
        slots = [seq.spec.adapter_slot for seq in going]
        return Computed(going, *self._steps.run(rows, positions, tokens, slots))

    def _rotary_position(self, seq: Sequence) -> int:
        """The position of the last token, as `DecoderModel.rope` takes it."""
        is_long = self.model.description.is_long(seq.spec.num_positions)
        return seq.newest_position + LONG * is_long

    def _sample(
        self, drawn: list[Sequence], computed: Computed | None, masks: TokenMasks | None
    ) -> SampledBatch:
        """The next tokens of the sequences, on the device."""
        states = [seq.sampling for seq in drawn]
        logits = self._logits(drawn, computed)
        sampled = sample_batch(logits, states, self.model.eos_token_ids, masks)
        if self.reads_late:
            if computed is not None and drawn == computed.sequences:
                rows = computed.rows
            else:
                (rows,) = indices_to_device([[seq.row for seq in drawn]], self.model.device)
            self._steps.newest.index_copy_(0, rows, sampled.tokens)
        return sampled

    def _logits(self, drawn: list[Sequence], computed: Computed | None) -> Tensor:
        """Of the sequences, those of `computed` first: [B, vocab_size] float32."""
        idx_of = {seq: idx for idx, seq in enumerate(computed.sequences)} if computed else {}
        own = [idx_of[seq] for seq in drawn if seq in idx_of]
        hidden = [seq.final_hidden for seq in drawn if seq.final_hidden is not None]
        if computed is None or computed.outputs.logits is None:
            hidden = [computed.outputs.hidden[idx] for idx in own if computed] + hidden
            return self.model.logits(torch.stack(hidden))
        parts = [computed.outputs.logits]
        if len(own) < len(parts[0]):
            index = indices_to_device([np.array(own, dtype=np.int64)], self.model.device)
            parts = [parts[0].index_select(0, *index)]
        if hidden:
            parts.append(self.model.logits(torch.stack(hidden)))
        return torch.cat(parts) if hidden else parts[0]


def _mask_rows(
    drawn: list[Sequence], newest: dict[Sequence, Sampled | WinnowError] | None = None
) -> list[MaskRow]:
    """The sequences with a grammar: those without an unread token, or with `newest` those with one.

    One whose unread token is an error needs no mask.
    """
    rows = []
    for row, seq in enumerate(drawn):
        constraint, tokens = seq.sampling.constraint, seq.sampling.generated
        if constraint is None or bool(seq.sampling.num_unread) != (newest is not None):
            continue
        if newest is not None:
            token = newest[seq]
            if not isinstance(token, Sampled):
                continue
            tokens = [*tokens, token.token_id]
        rows.append(MaskRow(row, constraint, tokens, seq.sampling.may_end))
    return rows


def _failures(drawn: list[Sequence]) -> dict[Sequence, WinnowError]:
    constraints = {seq: seq.sampling.constraint for seq in drawn}
    return {seq: one.failure for seq, one in constraints.items() if one and one.failure}
