"""Prints a summary as terminal tables, one per length; wide ones are split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.summary import Cell, Overall, Summary
from evals.variants import in_lines

_GAP = 2  # characters between columns


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    cells: list[str]
    bold: bool = False

    @property
    def width(self) -> int:
        lines = [line for text in (self.header, *self.cells) for line in text.split("\n")]
        return max(len(line) for line in lines) + _GAP


def print_summary(summary: Summary, console: Console) -> None:
    """Print a table per length. Rows are methods and budgets; columns are tasks and means."""
    for length in dict.fromkeys(row.length for row in summary.overall):
        rows = [row for row in summary.overall if row.length == length]
        cells = [cell for cell in summary.cells if cell.length == length]
        console.print(f"\n[bold]{length:,} tokens[/], {_samples(cells)}, score in %")
        for table in _tables(rows, cells, console.width):
            console.print(table)


def _samples(cells: Sequence[Cell]) -> str:
    counts = [cell.count for cell in cells]
    fewest, most = min(counts), max(counts)
    shown = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"{shown} sample{'' if most == 1 else 's'} a task"


def _tables(rows: Sequence[Overall], cells: Sequence[Cell], width: int) -> Iterator[Table]:
    """Tables that fit `width`, each with as many columns as possible."""
    names = [
        _Column("method", [in_lines(row.method) for row in rows]),
        _Column("budget", [_number(row.budget) for row in rows]),
    ]
    room = width - sum(column.width for column in names) - _GAP
    blocks = [*([column] for column in _task_columns(rows, cells)), _mean_columns(rows)]
    for part in _parts(blocks, room):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
        for column in [*names, *part]:
            table.add_column(
                column.header,
                justify="left" if column is names[0] else "right",
                style="bold" if column.bold else "",
                no_wrap=True,
            )
        for row in zip(*(column.cells for column in [*names, *part]), strict=True):
            table.add_row(*row)
        yield table


def _parts(blocks: Sequence[list[_Column]], room: int) -> Iterator[list[_Column]]:
    """The columns in groups that fit `room`; blocks are not split."""
    part: list[_Column] = []
    for block in blocks:
        if part and sum(column.width for column in [*part, *block]) > room:
            yield part
            part = []
        part = [*part, *block]
    yield part


def _task_columns(rows: Sequence[Overall], cells: Sequence[Cell]) -> Iterator[_Column]:
    by_place = {(cell.method, cell.budget, cell.task): cell for cell in cells}
    for task in dict.fromkeys(cell.task for cell in cells):
        found = [by_place.get((row.method, row.budget, task)) for row in rows]
        yield _Column(_header(task), [_percent(cell.mean if cell else None) for cell in found])


def _header(task: str) -> str:
    """A task's name in short lines: niah_multikey_1_prose becomes niah, multikey 1, prose."""
    lines: list[str] = []
    for word in task.split("_"):
        if lines and len(word) <= 2:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _mean_columns(rows: Sequence[Overall]) -> list[_Column]:
    return [
        _Column("mean", [_percent(row.mean) for row in rows], bold=True),
        _Column("± s.e.", [_percent(row.standard_error) for row in rows]),
        _Column("prefill\ncomputed", [_percent(row.computed_share) for row in rows]),
        _Column("KV\nkept", [_percent(row.kv_share) for row in rows]),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
