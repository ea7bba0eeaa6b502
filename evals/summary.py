"""Mean scores and costs over a run's records."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from evals.records import Record


class Setup(NamedTuple):
    """A variant at a length, for which means are taken."""

    length: int
    method: str
    budget: int | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One task under one setup.

    standard_error: of the mean score; None for a single sample.
    selection_layers: number of samples by selection layer; "none" counts those without one.
    """

    task: str
    length: int
    method: str
    budget: int | None
    count: int
    mean: float
    standard_error: float | None
    computed_share: float
    kv_share: float
    prefill_s: float
    selection_layer: float | None
    selection_layers: dict[str, int]


@dataclass(frozen=True, slots=True)
class Overall:
    """Means over all tasks of a setup, equally weighted."""

    length: int
    method: str
    budget: int | None
    num_tasks: int
    mean: float
    standard_error: float | None
    computed_share: float
    kv_share: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Means per task and overall, in the order in which setups and tasks were requested."""

    cells: tuple[Cell, ...]
    overall: tuple[Overall, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "cells": [asdict(cell) for cell in self.cells],
            "overall": [asdict(overall) for overall in self.overall],
        }


def summarize(records: Sequence[Record], setups: Sequence[Setup], tasks: Sequence[str]) -> Summary:
    """Means for the setups and tasks that have records."""
    groups: dict[tuple[Setup, str], list[Record]] = {}
    for record in records:
        groups.setdefault((setup_of(record), record.task), []).append(record)
    cells = [
        _cell(setup, task, groups[setup, task])
        for setup in setups
        for task in tasks
        if (setup, task) in groups
    ]
    by_setup = {setup: [cell for cell in cells if _setup(cell) == setup] for setup in setups}
    overall = [_overall(setup, own) for setup, own in by_setup.items() if own]
    return Summary(tuple(cells), tuple(overall))


def setup_of(record: Record) -> Setup:
    return Setup(record.length, record.method, record.budget)


def _setup(cell: Cell) -> Setup:
    return Setup(cell.length, cell.method, cell.budget)


def _cell(setup: Setup, task: str, records: Sequence[Record]) -> Cell:
    scores = [record.score for record in records]
    layers = [r.selection_layer for r in records if r.selection_layer is not None]
    return Cell(
        task=task,
        length=setup.length,
        method=setup.method,
        budget=setup.budget,
        count=len(records),
        mean=statistics.fmean(scores),
        standard_error=_standard_error(scores),
        computed_share=statistics.fmean(record.computed_share for record in records),
        kv_share=sum(r.kv_bytes_kept for r in records) / sum(r.kv_bytes_full for r in records),
        prefill_s=statistics.fmean(record.prefill_s for record in records),
        selection_layer=statistics.fmean(layers) if layers else None,
        selection_layers=_layer_counts(records),
    )


def _standard_error(scores: Sequence[float]) -> float | None:
    if len(scores) < 2:
        return None
    return float(statistics.stdev(scores) / len(scores) ** 0.5)


def _layer_counts(records: Sequence[Record]) -> dict[str, int]:
    layers = [r.selection_layer for r in records if r.selection_layer is not None]
    counts = {str(layer): count for layer, count in sorted(Counter(layers).items())}
    num_without = len(records) - len(layers)
    return counts | ({"none": num_without} if num_without else {})


def _overall(setup: Setup, cells: Sequence[Cell]) -> Overall:
    return Overall(
        length=setup.length,
        method=setup.method,
        budget=setup.budget,
        num_tasks=len(cells),
        mean=statistics.fmean(cell.mean for cell in cells),
        standard_error=_error_of_mean([cell.standard_error for cell in cells]),
        computed_share=statistics.fmean(cell.computed_share for cell in cells),
        kv_share=statistics.fmean(cell.kv_share for cell in cells),
        prefill_s=statistics.fmean(cell.prefill_s for cell in cells),
    )


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean of independent means; None if any is unknown."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return float(sum(error**2 for error in known) ** 0.5 / len(known))
