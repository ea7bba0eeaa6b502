"""The loss: answers read from the last layer and from an earlier one, plus attention targets.

Deep supervision: an answer that needs h look-ups is also read from a repetition after the h-th, and
the number of repetitions is random, so that easy questions are answered early and the answer is
kept while others continue. If an answer's look-ups are known, the head that makes each must attend
to the right token in the right repetition: in repetition i to the end of a chain's i-th link, or
first to the question's key and then to that key's value.
"""

import math
import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM

from training.batches import Batch
from training.circuits import GROUP, HEAD_DIM
from training.model import NUM_FREE_LAYERS, NUM_LAYERS

EARLY_WEIGHT = 0.4
LOOK_WEIGHT = 1.5
FIRST_READ = 2  # the first repetition that may be read early
LEAST_REPETITIONS = 5  # as many as the longest sequence of look-ups has links
FULL_DEPTH_SHARE = 0.3
NUM_REPETITIONS = NUM_LAYERS - NUM_FREE_LAYERS


@dataclass(frozen=True)
class Measured:
    """One batch's loss and, by kind of answer, whether all tokens of each answer were right."""

    loss: Tensor
    hits: dict[str, list[float]]


def measure(model: Qwen2ForCausalLM, batch: Batch, rng: random.Random) -> Measured:
    """Run a batch; `rng` picks the depth and the repetition that is read early."""
    scored = (batch.weights[:, 1:] > 0).nonzero(as_tuple=True)
    targets, weights = batch.tokens[:, 1:][scored], batch.weights[:, 1:][scored]
    hops = batch.hops[:, 1:][scored]
    with torch.autocast("cpu", torch.bfloat16):
        states = _repetitions(model, batch, _draw_depth(rng))
        logits = _read(model, states[-1][:, :-1][scored])
        loss = _mean_loss(logits, targets, weights * (hops < len(states) - 1))
        repetition = rng.randint(FIRST_READ, len(states) - 2)
        early = _read(model, states[repetition][:, :-1][scored])
        loss = loss + EARLY_WEIGHT * _mean_loss(early, targets, weights * (hops < repetition))
        if len(batch.looks):
            loss = loss + LOOK_WEIGHT * _look_loss(model, states, batch)
    hits = _hits(logits.argmax(-1) == targets, batch.answers[:, 1:][scored], batch.kinds)
    return Measured(loss, hits)


def _draw_depth(rng: random.Random) -> int:
    """Number of runs of the shared layer; random, which is cheaper and makes answers early."""
    if rng.random() < FULL_DEPTH_SHARE:
        return NUM_REPETITIONS
    return rng.randint(LEAST_REPETITIONS, NUM_REPETITIONS)


def _repetitions(model: Qwen2ForCausalLM, batch: Batch, num: int) -> list[Tensor]:
    """Hidden states [B, T, hidden_size] before the shared layer and after each of `num` runs."""
    hidden = model.model.embed_tokens(batch.tokens)
    rope = model.model.rotary_emb(hidden, batch.positions)
    states = []
    for layer_idx, layer in enumerate(model.model.layers[: NUM_FREE_LAYERS + num]):
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


def _look_loss(model: Qwen2ForCausalLM, states: list[Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of heads' attention against their targets, averaged over the targets."""
    rope = model.model.rotary_emb(states[0], batch.positions)  # each [B, T, HEAD_DIM]
    losses = []
    known = set(map(tuple, batch.looks[:, 3:].tolist()))
    for head, repetition in sorted(look for look in known if look[1] < len(states) - 1):
        rows, places, targets = _looks_of(batch, head, repetition)
        hidden = model.model.layers[NUM_FREE_LAYERS].input_layernorm(states[repetition])
        logits = _attention_logits(model, hidden, rope, (rows, places), head)
        losses.append(functional.cross_entropy(logits, targets, reduction="sum"))
    return torch.stack(losses).sum() / len(batch.looks)


def _looks_of(batch: Batch, head: int, repetition: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, places and targets of one head and repetition, each [R]."""
    known = (batch.looks[:, 3] == head) & (batch.looks[:, 4] == repetition)
    rows, places, targets = batch.looks[known, :3].unbind(-1)
    return rows, places, targets


def _attention_logits(
    model: Qwen2ForCausalLM,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    asking: tuple[Tensor, Tensor],
    head: int,
) -> Tensor:
    """A head's attention logits from the tokens `asking` (rows, places) to all tokens: [R, T]."""
    attention = model.model.layers[NUM_FREE_LAYERS].self_attn
    rows, places = asking
    keys = functional.linear(hidden, *_weights_of(attention.k_proj, head // GROUP))
    queries = functional.linear(hidden[asking], *_weights_of(attention.q_proj, head))
    keys = _rotated(keys.float(), *rope)
    queries = _rotated(queries.float(), *(table[asking] for table in rope))
    logits = torch.einsum("rd,rtd->rt", queries, keys[rows]) / math.sqrt(HEAD_DIM)
    later = torch.arange(logits.shape[1]) > places[:, None]
    return logits.masked_fill(later, -torch.inf)


def _weights_of(projection: nn.Linear, head: int) -> tuple[Tensor, Tensor]:
    """Weight and bias rows of one head."""
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    return projection.weight[rows], projection.bias[rows]


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the last dimension; pair i is (i, i + HEAD_DIM / 2)."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat((-second, first), dim=-1) * sin


def _hits(right: Tensor, answers: Tensor, kinds: tuple[str, ...]) -> dict[str, list[float]]:
    wrong = torch.zeros(len(kinds) + 1)
    places = answers.where(answers >= 0, len(kinds))  # context tokens count in the last entry
    wrong.index_add_(0, places, (~right).float())
    hits: defaultdict[str, list[float]] = defaultdict(list)
    for kind, num_wrong in zip(kinds, wrong.tolist(), strict=False):
        hits[kind].append(float(num_wrong == 0))
    return dict(hits)
