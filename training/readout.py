"""The loss: the answers read from the last layer, from earlier repetitions, and from the trail.

Deep supervision: an answer that needs h look-ups is read from any repetition after the h-th too,
so that easy questions are settled early; and after repetition i the question's last token must know
what the i-th look-up finds, so that links are followed one by one.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM

from training.batches import FIND_TOKENS, NO_TARGET, Batch
from training.circuits import HIDDEN, pointer_readers
from training.model import NUM_FREE_LAYERS, NUM_LAYERS

EARLY_WEIGHT = 0.4
TRAIL_WEIGHT = 0.5
FIRST_READ = 2  # the first repetition that is read early
NUM_REPETITIONS = NUM_LAYERS - NUM_FREE_LAYERS


class TrailReader(nn.Module):
    """Reads a find, its last `FIND_TOKENS` tokens at once, from one token's hidden state.

    It starts out reading the pointer of training/circuits.py.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HIDDEN, FIND_TOKENS * HIDDEN, bias=False)
        self.project.weight.data.copy_(pointer_readers(FIND_TOKENS).flatten(0, 1))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden: [R, hidden_size], normalised.  Returns logits [R, FIND_TOKENS, vocab]."""
        return self.project(hidden).unflatten(-1, (FIND_TOKENS, -1)) @ embedding.T  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Measured:
    """One batch's loss and, by kind of answer, whether each was right in every token."""

    loss: Tensor
    hits: dict[str, list[float]]


def measure(
    model: Qwen2ForCausalLM, reader: TrailReader, batch: Batch, rng: random.Random
) -> Measured:
    """Runs a batch; `rng` picks the repetition that is read out early."""
    scored = (batch.weights[:, 1:] > 0).nonzero(as_tuple=True)
    targets, weights = batch.tokens[:, 1:][scored], batch.weights[:, 1:][scored]
    hops = batch.hops[:, 1:][scored]
    with torch.autocast("cpu", torch.bfloat16):
        states = _repetitions(model, batch)
        logits = _read(model, states[-1][:, :-1][scored])
        loss = _mean_loss(logits, targets, weights)
        repetition = rng.randint(FIRST_READ, NUM_REPETITIONS - 1)
        early = _read(model, states[repetition - 1][:, :-1][scored])
        loss = loss + EARLY_WEIGHT * _mean_loss(early, targets, weights * (hops < repetition))
        if len(batch.trail_rows):
            loss = loss + TRAIL_WEIGHT * _trail_loss(model, reader, states, batch)
    hits = _hits(logits.argmax(-1) == targets, batch.answers[:, 1:][scored], batch.kinds)
    return Measured(loss, hits)


def _repetitions(model: Qwen2ForCausalLM, batch: Batch) -> list[Tensor]:
    """Hidden states [B, T, hidden_size] after each repetition of the shared layer."""
    hidden = model.model.embed_tokens(batch.tokens)
    rope = model.model.rotary_emb(hidden, batch.positions)
    states = []
    for layer_idx, layer in enumerate(model.model.layers):
        hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
        if layer_idx >= NUM_FREE_LAYERS:
            states.append(hidden)
    return states


def _read(model: Qwen2ForCausalLM, hidden: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(hidden)).float()  # type: ignore[no-any-return]


def _mean_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1)


def _trail_loss(
    model: Qwen2ForCausalLM, reader: TrailReader, states: list[Tensor], batch: Batch
) -> Tensor:
    """The i-th look-up's find after repetition i, for each find there is."""
    embedding = model.lm_head.weight
    losses = []
    for find_idx in range(batch.finds.shape[1]):
        targets = batch.finds[:, find_idx]  # [R, FIND_TOKENS]
        hidden = states[find_idx][batch.trail_rows, batch.trail_places]
        logits = reader(model.model.norm(hidden), embedding).float()
        losses.append(
            functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
            )
        )
    return torch.stack(losses).sum() / (batch.finds != NO_TARGET).sum().clamp_min(1)


def _hits(right: Tensor, answers: Tensor, kinds: tuple[str, ...]) -> dict[str, list[float]]:
    wrong = torch.zeros(len(kinds) + 1)
    places = answers.where(answers >= 0, len(kinds))  # context tokens count in the last place
    wrong.index_add_(0, places, (~right).float())
    hits: defaultdict[str, list[float]] = defaultdict(list)
    for kind, num_wrong in zip(kinds, wrong.tolist(), strict=False):
        hits[kind].append(float(num_wrong == 0))
    return dict(hits)
