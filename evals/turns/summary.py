"""Means over conversations, for each way and turn."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """A way to answer, at a length."""

    length: int
    way: str


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One answer and its score, 0 to 1.  turn: from 1.  The others: as in TurnAnswer."""

    place: Place
    index: int
    turn: int
    answer: str
    reference: str
    score: float
    num_prompt_tokens: int
    computed_share: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class TurnMeans:
    """One turn in one way: means, but for ttft_s, which is the median.

    standard_error: of the score; None for a single conversation.
    """

    place: Place
    turn: int
    count: int
    score: float
    standard_error: float | None
    computed_share: float
    ttft_s: float


def summarize(records: Sequence[TurnRecord]) -> list[TurnMeans]:
    """In the order in which lengths, ways and turns first come."""
    groups: dict[tuple[Place, int], list[TurnRecord]] = {}
    for record in records:
        groups.setdefault((record.place, record.turn), []).append(record)
    return [_means(place, turn, own) for (place, turn), own in groups.items()]


def _means(place: Place, turn: int, records: Sequence[TurnRecord]) -> TurnMeans:
    scores = [record.score for record in records]
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return TurnMeans(
        place=place,
        turn=turn,
        count=len(records),
        score=statistics.fmean(scores),
        standard_error=error,
        computed_share=statistics.fmean(record.computed_share for record in records),
        ttft_s=statistics.median(record.ttft_s for record in records),
    )
