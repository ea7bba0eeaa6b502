"""Training batches: samples padded to one length, with positions far beyond that length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.curriculum import Stage, make_sample
from training.samples import SHORT, Sample, SampleMaker
from training.tokenizer import MAX_POSITIONS

TOKENS_PER_BATCH = 2048
GAP_SHARE = 0.5
MAX_GAPS = 3
ZERO_START_SHARE = 0.3


@dataclass(frozen=True)
class Batch:
    """tokens, positions: [B, T] int64.  weights: [B, T] float32.

    answers: [B, T] int64, an index into `kinds`, or -1.  hops: [B, T] int64, 0 outside answers.
    looks: [R, 5] int64, attention targets: row, place, target, head, repetition.
    """

    length: int
    tokens: Tensor
    positions: Tensor
    weights: Tensor
    answers: Tensor
    kinds: tuple[str, ...]
    hops: Tensor
    looks: Tensor


def make_batch(rng: random.Random, maker: SampleMaker, stage: Stage, length: int) -> Batch:
    """A batch of sequences of at most `length` tokens."""
    num_samples = max(1, TOKENS_PER_BATCH // length)
    samples = [make_sample(rng, maker, stage, length) for _ in range(num_samples)]
    ends = maker.sentence_ends
    positions = [draw_positions(rng, _gap_places(sample, ends), length) for sample in samples]
    return collate(samples, positions, length)


def _gap_places(sample: Sample, sentence_ends: frozenset[int]) -> list[int]:
    """Places where a gap splits no sentence; none in sequences too short to need one."""
    if len(sample.tokens) <= SHORT:
        return []
    return [i + 1 for i, token in enumerate(sample.tokens) if token in sentence_ends]


def draw_positions(rng: random.Random, gap_places: Sequence[int], length: int) -> list[int]:
    """Ascending positions below `MAX_POSITIONS`, from a random start; half of them have gaps.

    Gaps teach long distances at the cost of short sequences (PoSE, arXiv 2309.10400).
    """
    spare = MAX_POSITIONS - length
    position = 0 if rng.random() < ZERO_START_SHARE else rng.randrange(spare)
    spare -= position
    num_gaps = rng.randint(1, MAX_GAPS) if rng.random() < GAP_SHARE else 0
    places = set(rng.sample(gap_places, min(num_gaps, len(gap_places))))
    positions = []
    for index in range(length):
        if index in places:
            jump = rng.randint(0, spare)
            spare -= jump
            position += jump
        positions.append(position)
        position += 1
    return positions


def collate(samples: Sequence[Sample], positions: Sequence[Sequence[int]], length: int) -> Batch:
    """Samples cut or padded to `length`, with answers numbered over the whole batch."""
    kinds: list[str] = []
    answers, hops = [], []
    for sample in samples:
        offset = len(kinds)
        answers.append([a + offset if a >= 0 else -1 for a in sample.answers])
        hops.append([sample.hops[a] if a >= 0 else 0 for a in sample.answers])
        kinds += sample.kinds
    looks = [
        (row, look.place, look.target, look.head, look.repetition)
        for row, sample in enumerate(samples)
        for look in sample.looks
        if look.place < length
    ]
    return Batch(
        length,
        _padded([sample.tokens for sample in samples], length, 0),
        torch.tensor(positions),
        _padded([sample.weights for sample in samples], length, 0.0),
        _padded(answers, length, -1),
        tuple(kinds),
        _padded(hops, length, 0),
        torch.tensor(looks, dtype=torch.long).view(-1, 5),
    )


def _padded(rows: Sequence[Sequence[float]], length: int, padding: float) -> Tensor:
    return torch.tensor([(list(row) + [padding] * (length - len(row)))[:length] for row in rows])
