"""Runs an evaluation: from its plan to records, summary, table and pictures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evals.model import Answer, AnswerStats, Instance, Model
from evals.pictures import can_draw, draw_pictures
from evals.plan import Plan, key_of
from evals.records import Key, Record, RunFolder, require_same_run, write_json
from evals.summary import summarize
from evals.table import print_summary
from evals.tasks.base import Example, Task
from winnow.errors import InvalidSetting

SUMMARY_FILE = "summary.json"
_NO_PICTURES = (
    "no pictures, since matplotlib is missing: pip install 'winnow-serve[eval]', and the same "
    "command draws them"
)


def evaluate(plan: Plan, model: Model, folder: Path, *, progress: Console, result: Console) -> None:
    """Run what is missing in `folder`, then write and print the results.

    Raises WinnowError, before anything is written, if something requested cannot run.
    """
    settings = plan.to_json() | model.identity()
    require_same_run(folder, settings)
    with progress.status("checking that everything asked for can run"):
        require_runs(plan, model)
    with RunFolder(folder, settings) as run:
        answer(plan, model, run, progress)
        summary = summarize(run.records, plan.setups(), [task.name for task in plan.tasks])
        write_json(folder / SUMMARY_FILE, {"settings": settings} | summary.to_json())
        pictures = draw_pictures(folder, run.records, summary, _thresholds(plan, model))
    print_summary(summary, result)
    files = ", ".join(file.name for file in [folder / SUMMARY_FILE, *pictures])
    result.print(f"\n{folder}: {files}", highlight=False, soft_wrap=True)
    if not can_draw():
        result.print(_NO_PICTURES, highlight=False, soft_wrap=True, markup=False)


def _thresholds(plan: Plan, model: Model) -> dict[str, float]:
    known = {variant.method: model.threshold(variant) for variant in plan.variants}
    return {method: value for method, value in known.items() if value is not None}


def require_runs(plan: Plan, model: Model) -> None:
    """Raise the error that any example, or a variant's longest prompt, would be refused with."""
    require_lengths(plan.lengths, model)
    shortest = min(plan.lengths)  # the least likely to fit an example
    for task in plan.tasks:
        _example(plan, model, task, shortest, plan.first_index)
    max_new_tokens = max(task.max_new_tokens for task in plan.tasks)
    num_prompt_tokens = min(max(plan.lengths), model.max_positions - max_new_tokens)
    model.require_runs(plan.variants, num_prompt_tokens, max_new_tokens)
    for index, task in product(plan.indices[1:], plan.tasks):
        _example(plan, model, task, shortest, index)  # last, since there may be thousands


def require_lengths(lengths: Sequence[int], model: Model) -> None:
    """Raise InvalidSetting for a length that the model does not have."""
    for length in lengths:
        if length > model.max_positions:
            raise InvalidSetting(
                f"--length {length:,}: the model has {model.max_positions:,} positions",
                param="length",
            )


def _example(plan: Plan, model: Model, task: Task, length: int, index: int) -> Example:
    """An example whose whole prompt is within `length` tokens and leaves room for its answer."""
    room = min(length, model.max_positions - task.max_new_tokens) - model.frame_tokens
    return task.example(index, plan.seed, room, model.count)


def answer(
    plan: Plan, model: Model, run: RunFolder, console: Console, what: str = "answers"
) -> None:
    """Compute and append the records that the run lacks.  what: their name in the progress line."""
    wanted = plan.keys()
    done = wanted & {record.key for record in run.records}
    if done == wanted:
        return
    with _progress(console, len(wanted), len(done), what) as (progress, bar):
        for instance, answer in model.answers(_instances(plan, model, done)):
            run.append(_record(plan, instance, answer))
            progress.advance(bar)


def _instances(plan: Plan, model: Model, done: set[Key]) -> Iterator[Instance]:
    for index, length, task in plan.places():
        missing = [
            variant for variant in plan.variants if key_of(task, length, index, variant) not in done
        ]
        if missing:
            example = _example(plan, model, task, length, index)
            yield from (Instance(example, length, variant) for variant in missing)


@contextmanager
def _progress(
    console: Console, total: int, completed: int, what: str
) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as progress:
        yield progress, progress.add_task(what, total=total, completed=completed)


def _record(plan: Plan, instance: Instance, answer: Answer) -> Record:
    example = instance.example
    task = next(task for task in plan.tasks if task.name == example.task)
    return Record(
        task=example.task,
        length=instance.length,
        index=example.index,
        method=instance.variant.method,
        budget=instance.variant.budget,
        depth=example.depth,
        answer=answer.text,
        references=example.answers,
        score=task.metric(answer.text, example.answers),
        **{field.name: getattr(answer, field.name) for field in fields(AnswerStats)},
    )
