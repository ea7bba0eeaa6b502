"""The loss: the answers read from the last layer, from earlier repetitions, and from the trail.

Deep supervision: an answer that needs h look-ups is read from any repetition after the h-th too,
so that easy questions are settled early; and in repetition i the following head of the last
prompt token must look at the end of the i-th link, so that links are followed one by one.
"""

import math
import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM

from training.batches import NO_TARGET, Batch
from training.circuits import FOLLOWING_HEAD, FOLLOWING_KV_HEAD, HEAD_DIM
from training.model import NUM_FREE_LAYERS, NUM_LAYERS

EARLY_WEIGHT = 0.4
TRAIL_WEIGHT = 0.5
FIRST_READ = 2  # the first repetition that is read early
NUM_REPETITIONS = NUM_LAYERS - NUM_FREE_LAYERS


@dataclass(frozen=True)
class Measured:
    """One batch's loss and, by kind of answer, whether each was right in every token."""

    loss: Tensor
    hits: dict[str, list[float]]


def measure(model: Qwen2ForCausalLM, batch: Batch, rng: random.Random) -> Measured:
    """Runs a batch; `rng` picks the repetition that is read out early."""
    scored = (batch.weights[:, 1:] > 0).nonzero(as_tuple=True)
    targets, weights = batch.tokens[:, 1:][scored], batch.weights[:, 1:][scored]
    hops = batch.hops[:, 1:][scored]
    with torch.autocast("cpu", torch.bfloat16):
        states = _repetitions(model, batch)
        logits = _read(model, states[-1][:, :-1][scored])
        loss = _mean_loss(logits, targets, weights)
        repetition = rng.randint(FIRST_READ, NUM_REPETITIONS - 1)
        early = _read(model, states[repetition][:, :-1][scored])
        loss = loss + EARLY_WEIGHT * _mean_loss(early, targets, weights * (hops < repetition))
        if len(batch.trail_rows):
            loss = loss + TRAIL_WEIGHT * _trail_loss(model, states, batch)
    hits = _hits(logits.argmax(-1) == targets, batch.answers[:, 1:][scored], batch.kinds)
    return Measured(loss, hits)


def _repetitions(model: Qwen2ForCausalLM, batch: Batch) -> list[Tensor]:
    """Hidden states [B, T, hidden_size] before the shared layer and after each repetition of it."""
    hidden = model.model.embed_tokens(batch.tokens)
    rope = model.model.rotary_emb(hidden, batch.positions)
    states = []
    for layer_idx, layer in enumerate(model.model.layers):
        if layer_idx == NUM_FREE_LAYERS:
            states.append(hidden)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
        if layer_idx >= NUM_FREE_LAYERS:
            states.append(hidden)
    return states


def _read(model: Qwen2ForCausalLM, hidden: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(hidden)).float()  # type: ignore[no-any-return]


def _mean_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1)


def _trail_loss(model: Qwen2ForCausalLM, states: list[Tensor], batch: Batch) -> Tensor:
    """How far the following head is from looking at the i-th link in repetition i."""
    layer, rows = model.model.layers[NUM_FREE_LAYERS], batch.trail_rows
    rope = model.model.rotary_emb(states[0], batch.positions)  # each [B, T, HEAD_DIM]
    losses = []
    for link_idx in range(batch.trail_ends.shape[1]):
        targets = batch.trail_ends[:, link_idx]
        known = targets != NO_TARGET
        hidden = layer.input_layernorm(states[link_idx])
        keys = functional.linear(hidden, *_following(layer.self_attn.k_proj, FOLLOWING_KV_HEAD))
        asking = hidden[rows, batch.trail_places]
        queries = functional.linear(asking, *_following(layer.self_attn.q_proj, FOLLOWING_HEAD))
        queries, keys = (
            _rotated(queries.float(), *(table[rows, batch.trail_places] for table in rope)),
            _rotated(keys.float(), *rope),
        )
        logits = torch.einsum("rd,rtd->rt", queries, keys[rows]) / math.sqrt(HEAD_DIM)
        later = torch.arange(logits.shape[1]) > batch.trail_places[:, None]
        logits = logits.masked_fill(later, -torch.inf)[known]
        losses.append(functional.cross_entropy(logits, targets[known], reduction="sum"))
    return torch.stack(losses).sum() / (batch.trail_ends != NO_TARGET).sum()


def _following(projection: nn.Linear, head: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of one head."""
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    return projection.weight[rows], projection.bias[rows]


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the last dimension; pair i is (i, i + HEAD_DIM / 2)."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat((-second, first), dim=-1) * sin


def _hits(right: Tensor, answers: Tensor, kinds: tuple[str, ...]) -> dict[str, list[float]]:
    wrong = torch.zeros(len(kinds) + 1)
    places = answers.where(answers >= 0, len(kinds))  # context tokens count in the last place
    wrong.index_add_(0, places, (~right).float())
    hits: defaultdict[str, list[float]] = defaultdict(list)
    for kind, num_wrong in zip(kinds, wrong.tolist(), strict=False):
        hits[kind].append(float(num_wrong == 0))
    return dict(hits)
