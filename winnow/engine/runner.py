"""ModelRunner: the forward pass of one decode batch, and sampling of each next token."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.attention import StepAttention, decode_backend
from winnow.decoder import DecoderModel
from winnow.engine.kv_pool import KVPool
from winnow.engine.sequence import Sequence
from winnow.errors import EngineFailed, NotFinite
from winnow.sampling import Sampled, sample_batch
from winnow.to_device import indices_to_device
from winnow.tokens import Token


@dataclass(frozen=True, slots=True, eq=False)
class StepQueries:
    """The queries that a forward pass computed for its sequences.

    layers: each layer's [B, num_heads, head_dim].  scaling: of the attention logits.
    """

    sequences: list[Sequence]
    layers: list[Tensor]
    scaling: float

    def stacked(self) -> Tensor:
        """Queries of all layers: [L, B, num_heads, head_dim]."""
        return torch.stack(self.layers)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """The token or error of each sequence of a batch. queries: None if no layer was computed."""

    tokens: dict[Sequence, Token | EngineFailed] = field(default_factory=dict)
    queries: StepQueries | None = None


class ModelRunner:
    """Runs batches of sequences whose KV is in `pool`."""

    def __init__(self, model: DecoderModel, pool: KVPool) -> None:
        self.model = model
        shape = pool.shape
        self._backend = decode_backend(pool, shape.num_heads // shape.num_kv_heads)

    def run(self, batch: list[Sequence]) -> StepResult:
        """The next token of every sequence, or its error.

        Raises RuntimeError if the device fails; no sequence's KV can be trusted then.
        """
        if not batch:
            return StepResult()
        hidden, queries = self._forward(batch)
        return StepResult(self._sample(batch, hidden), queries)

    def _forward(self, batch: list[Sequence]) -> tuple[Tensor, StepQueries | None]:
        """The hidden states to sample each next token from: [B, hidden_size].

        A sequence that has just joined uses its final hidden state from prefill.
        """
        going = [seq for seq in batch if seq.final_hidden is None]
        computed, queries = self._forward_tokens(going) if going else ((), None)
        rest = iter(computed)
        hidden = [next(rest) if seq.final_hidden is None else seq.final_hidden for seq in batch]
        for seq in batch:
            seq.final_hidden = None
        return torch.stack(hidden), queries

    def _forward_tokens(self, going: list[Sequence]) -> tuple[Tensor, StepQueries]:
        """Feed each sequence's last token through all layers: [B, hidden_size]."""
        model = self.model
        newest = [seq.sampling.generated[-1] for seq in going]
        at = [seq.next_position - 1 for seq in going]
        tokens, positions = indices_to_device([newest, at], model.device)
        attention = StepAttention(self._backend, [seq.row for seq in going], positions)
        hidden, rope = model.embed(tokens[:, None]), model.rope(positions[:, None])
        for layer_idx in range(model.shape.num_layers):
            hidden = model.layer(layer_idx, hidden, rope, attention)
        return hidden[:, 0], StepQueries(going, attention.queries, attention.scaling)

    def _sample(
        self, batch: list[Sequence], hidden: Tensor
    ) -> dict[Sequence, Token | EngineFailed]:
        """Each sequence's next token, replayed or sampled.  hidden: [B, hidden_size]."""
        new = [row for row, seq in enumerate(batch) if seq.next_replayed is None]
        sampled: Iterator[Sampled | NotFinite] = iter(())
        if new:
            logits = self.model.logits(torch.stack([hidden[row] for row in new]))
            states = [batch[row].sampling for row in new]
            sampled = iter(sample_batch(logits, states, self.model.eos_token_ids).read())
        tokens: dict[Sequence, Token | EngineFailed] = {}
        for seq in batch:
            replayed = seq.next_replayed
            outcome = next(sampled) if replayed is None else Sampled(replayed)
            if isinstance(outcome, Sampled):
                tokens[seq] = seq.take(outcome, self.model)
            else:
                tokens[seq] = outcome
        return tokens
