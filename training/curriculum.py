"""The curriculum: stages with their tasks, sequence lengths and learning rates, in order."""

import random
from dataclasses import dataclass

from training.examples import example_sample
from training.samples import Sample, SampleMaker
from training.tasks import MAX_HOPS

MAX_QUESTIONS = 60
_LOOKUPS = ("needle", "needle", "needle", "json", "json", "passkey", "number_string")
_LONG_KEYS = ("needle_uuid", "needle_uuid_key", "json_uuid", "json_uuid")
_SINGLE = ("passkey", "number_string")  # one of each in a context
_SEVERAL = ("multivalue", "multiquery")


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    lengths, shares: sequence lengths in tokens, and the share of batches with each.
    batches_per_step: each of about TOKENS_PER_BATCH tokens, whatever their length.
    max_tokens: the stage ends after this many, or
    target_accuracy: when the moving average of exact answers at the longest length reaches this.
    max_hops: length of the longest chains.
    has_all: also long keys, several answers and listed variables.
    variety: share of sequences with the benchmarks' openings and varied wordings of a question.
    examples: share of sequences that are one example of the evaluation's tasks.
    drilled: tasks that half of these examples come from.
    learning_rate, final_learning_rate: interpolated linearly over the stage's tokens.
    """

    name: str
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    max_tokens: int
    learning_rate: float
    final_learning_rate: float
    batches_per_step: int = 2
    target_accuracy: float = 1.01
    max_hops: int = MAX_HOPS
    has_all: bool = True
    is_basic: bool = False  # pairs and copies, and chains from the first step on
    variety: float = 0.8
    examples: float = 0.0
    drilled: tuple[str, ...] = ()


CURRICULUM = (
    Stage("basics", (64, 256), (0.5, 0.5), 1_000_000, 1e-3, 1e-3, max_hops=3, is_basic=True),
    Stage("128", (64, 128), (0.2, 0.8), 1_000_000, 1e-3, 1e-3, 2, 0.85, 2, False, variety=0.0),
    Stage("256", (64, 128, 256), (0.1, 0.3, 0.6), 2_500_000, 1e-3, 1e-3, 2, 0.8, 3, variety=0.4),
    Stage("512", (128, 256, 512), (0.1, 0.3, 0.6), 2_500_000, 1e-3, 8e-4, 2, 0.85, 4),
    Stage("1024", (128, 512, 1024), (0.1, 0.3, 0.6), 2_200_000, 8e-4, 6e-4, 2, 0.9),
    Stage(
        "mixed",
        (256, 512, 1024, 2048),
        (0.35, 0.3, 0.2, 0.15),
        18_600_000,
        8e-4,
        6e-4,
        examples=0.5,
    ),
    Stage(
        "2048",
        (256, 512, 1024, 2048),
        (0.2, 0.3, 0.3, 0.2),
        10_800_000,
        6e-4,
        1e-4,
        examples=0.5,
    ),
    Stage(
        "4096",
        (512, 1024, 2048, 4096),
        (0.1, 0.2, 0.5, 0.2),
        1_000_000,
        1e-4,
        1e-5,
        examples=0.5,
    ),
    Stage(
        "again",
        (256, 512, 1024, 2048),
        (0.15, 0.25, 0.3, 0.3),
        14_000_000,
        5e-4,
        5e-5,
        examples=0.5,
    ),
    Stage(
        "4096 again",
        (512, 1024, 2048, 4096),
        (0.1, 0.2, 0.5, 0.2),
        1_000_000,
        5e-5,
        5e-6,
        examples=0.5,
    ),
    Stage(
        "long keys",
        (512, 1024, 2048),
        (0.15, 0.35, 0.5),
        3_000_000,
        2e-4,
        5e-6,
        examples=0.8,
        drilled=("kv_retrieval", "niah_multikey_2", "niah_multikey_3"),
    ),
    Stage(
        "pairs of UUIDs",
        (512, 1024, 2048),
        (0.1, 0.3, 0.6),
        3_000_000,
        1.5e-4,
        3e-6,
        examples=0.9,
        drilled=("kv_retrieval",),
    ),
)


def make_sample(rng: random.Random, maker: SampleMaker, stage: Stage, length: int) -> Sample:
    """One sequence of at most `length` tokens for this stage."""
    while len((sample := _draw(rng, maker, stage, length)).tokens) > length:
        pass  # a single question may be too long for a short sequence
    return sample


def _draw(rng: random.Random, maker: SampleMaker, stage: Stage, length: int) -> Sample:
    if stage.is_basic and length > 64:
        return maker.retrieval(rng, length, _chains(rng, stage, length), MAX_QUESTIONS)
    if rng.random() < stage.examples:
        is_drill = bool(stage.drilled) and rng.random() < 0.5
        return example_sample(rng, maker, length, stage.drilled if is_drill else ())
    if rng.random() < _basic_share(length):
        return maker.copying(rng, length) if rng.random() < 0.2 else maker.pairs(rng, length)
    known = _kinds(rng, stage, length)
    alone = rng.choice(known)
    kinds = known if rng.random() < 0.4 or alone in _SINGLE else (alone,)
    return maker.retrieval(
        rng, length, kinds, MAX_QUESTIONS, is_varied=rng.random() < stage.variety
    )


def _kinds(rng: random.Random, stage: Stage, length: int) -> tuple[str, ...]:
    """Kinds of facts to draw from; chains have one number of hops, drawn for each sequence."""
    known = (*_LOOKUPS, *_chains(rng, stage, length) * 2)
    if not stage.has_all:
        return known
    return (*known, *_SEVERAL, *(_LONG_KEYS if length > 256 else ()))


def _chains(rng: random.Random, stage: Stage, length: int) -> tuple[str, ...]:
    hops = rng.randint(1, min(stage.max_hops, max(2, length // 64)))
    return f"chain_ordered_{hops}", f"chain_shuffled_{hops}"


def _basic_share(length: int) -> float:
    """The share of sequences that stay basic (pairs and copies).

    A sequence with room for only one fact teaches the model to copy the only number, whatever the
    key, and to forget lookup, learned from pairs. So the shortest sequences are pairs and copies.
    """
    return 1.0 if length <= 64 else 0.3 if length <= 128 else 0.1 if length <= 256 else 0.0
