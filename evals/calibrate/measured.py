"""What the records say of each variant, prompt by prompt, beside the unpruned answer."""

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from evals.calibrate.candidates import UNPRUNED_VARIANT
from evals.records import Record
from evals.variants import Variant

_RESAMPLES = 1000
_OUTSIDE = 0.025  # of the resamples on each side of the interval

# Task and index: one prompt.
Prompt = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Interval:
    """A share with its 95% interval, from resampled prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True, slots=True)
class Result:
    """One variant over some prompts.

    score: tasks weigh the same.  kept: of the unpruned score, over the same prompts.
    prefill, kv: shares computed and kept.
    """

    name: str
    num_prompts: int
    score: float
    kept: Interval
    prefill: float
    kv: float


class Measured:
    """Records by variant and prompt."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records: dict[tuple[str, Prompt], Record] = {
            (record.method, (record.task, record.index)): record for record in records
        }

    def of(self, tried: Variant, prompt: Prompt) -> Record:
        return self._records[tried.method, prompt]

    def unpruned(self, prompt: Prompt) -> Record:
        return self.of(UNPRUNED_VARIANT, prompt)

    def prompts(self, tasks: Collection[str], indices: Collection[int]) -> list[Prompt]:
        """The prompts that were answered unpruned, of these tasks and indices."""
        return [
            prompt
            for method, prompt in self._records
            if method == UNPRUNED_VARIANT.method and prompt[0] in tasks and prompt[1] in indices
        ]

    def result(self, tried: Variant, prompts: Sequence[Prompt], name: str = "") -> Result:
        records = [self.of(tried, prompt) for prompt in prompts]
        kv_full = sum(record.kv_bytes_full for record in records)
        return Result(
            name=name or tried.method,
            num_prompts=len(prompts),
            score=mean_over_tasks([(record.task, record.score) for record in records]),
            kept=self._kept(tried, prompts),
            prefill=statistics.fmean(record.computed_share for record in records),
            kv=sum(record.kv_bytes_kept for record in records) / kv_full,
        )

    def _kept(self, tried: Variant, prompts: Sequence[Prompt]) -> Interval:
        """The variant's score of the unpruned one; prompts are resampled with both answers."""
        pairs = self._pairs(tried, prompts)
        rng = Random(0)
        drawn = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
        outside = int(_OUTSIDE * _RESAMPLES)
        return Interval(_ratio(pairs), drawn[outside], drawn[-1 - outside])

    def share_kept(self, tried: Variant, prompts: Sequence[Prompt]) -> float:
        """The variant's score of the unpruned one."""
        return _ratio(self._pairs(tried, prompts))

    def _pairs(self, tried: Variant, prompts: Sequence[Prompt]) -> list[tuple[float, float]]:
        """Of each prompt the variant's score and the unpruned one."""
        return [(self.of(tried, one).score, self.unpruned(one).score) for one in prompts]


def mean_over_tasks(scores: Iterable[tuple[str, float]]) -> float:
    """The mean of the tasks' means."""
    by_task: dict[str, list[float]] = {}
    for task, score in scores:
        by_task.setdefault(task, []).append(score)
    return statistics.fmean(statistics.fmean(own) for own in by_task.values())


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Score over unpruned score; 1 where both are 0."""
    pruned, full = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return pruned / full if full else 1.0
