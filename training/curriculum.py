"""What is trained on, in which order, for how long."""

import random
from dataclasses import dataclass

from training.samples import Sample, SampleMaker

_SIMPLE_KINDS = ("needle", "needle", "needle", "json", "passkey", "chain1", "chain2")
_ALL_KINDS = (*_SIMPLE_KINDS, "chain3")


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    lengths, shares: sequence lengths in tokens and how often a batch has each.
    batches_per_step: each of about TOKENS_PER_BATCH tokens, whatever their length.
    max_tokens: the stage ends after these, or
    target_accuracy: when the moving average of exact answers at the longest length reaches this.
    variety: the share of sequences with prefaces and many wordings of a question.
    learning_rate, final_learning_rate: from the first to the second, linearly in tokens.
    """

    name: str
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    max_tokens: int
    learning_rate: float
    final_learning_rate: float
    batches_per_step: int = 2
    target_accuracy: float = 1.01
    is_basic: bool = False
    variety: float = 0.8


_TO_1024 = (128, 256, 512, 1024)

CURRICULUM = (
    Stage("basics", (64,), (1,), 4_000_000, 2e-3, 2e-3, target_accuracy=0.8, is_basic=True),
    Stage("128", (64, 128), (0.2, 0.8), 2_000_000, 2e-3, 1.5e-3, 2, 0.8, variety=0.0),
    Stage("256", (64, 128, 256), (0.1, 0.3, 0.6), 1_200_000, 1.5e-3, 1.2e-3, 2, 0.85, variety=0.5),
    Stage("512", _TO_1024, (0.1, 0.3, 0.45, 0.15), 4_000_000, 1.2e-3, 4e-4, 2, 0.9),
    Stage("1024", (128, 512, 1024), (0.1, 0.3, 0.6), 2_000_000, 6e-4, 4e-4, 4, 0.92),
    Stage("2048", (256, 1024, 2048), (0.1, 0.3, 0.6), 1_400_000, 5e-4, 4e-4, 4, 0.92),
    Stage("4096", (256, 1024, 2048, 4096), (0.1, 0.15, 0.25, 0.5), 1_800_000, 4e-4, 5e-5, 2),
)


def make_sample(rng: random.Random, maker: SampleMaker, stage: Stage, length: int) -> Sample:
    """One sequence of at most `length` tokens for this stage."""
    if stage.is_basic or rng.random() < _basic_share(length):
        return maker.copying(rng, length) if rng.random() < 0.3 else maker.pairs(rng, length)
    known = _ALL_KINDS if stage.variety else _SIMPLE_KINDS
    kinds = known if rng.random() < 0.5 else (rng.choice(known),)
    return maker.retrieval(rng, length, kinds, 24, is_varied=rng.random() < stage.variety)


def _basic_share(length: int) -> float:
    """How many sequences stay basic.

    A sequence with room for one fact alone teaches to copy the only number, whatever the key: then
    lookup, learned from pairs, is forgotten. So the shortest sequences are pairs and copies.
    """
    return 1.0 if length <= 64 else 0.3 if length <= 128 else 0.1 if length <= 256 else 0.0
