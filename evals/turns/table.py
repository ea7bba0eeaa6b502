"""Prints what each turn scored and cost: a table per length and figure."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.turns.summary import Place, TurnMeans

FIGURES: dict[str, Callable[[TurnMeans], float]] = {
    "score, %": lambda means: 100 * means.score,
    "layer-tokens computed, %": lambda means: 100 * means.computed_share,
    "time to first token, s": lambda means: means.ttft_s,
}


def print_means(means: Sequence[TurnMeans], console: Console) -> None:
    """Rows are ways, columns are turns."""
    for length in dict.fromkeys(one.place.length for one in means):
        own = [one for one in means if one.place.length == length]
        count = own[0].count
        conversations = f"{count:,} conversation{'' if count == 1 else 's'}"
        console.print(f"\n[bold]{length:,} tokens[/], {conversations}")
        for title, figure in FIGURES.items():
            console.print(_table(title, figure, own))


def _table(title: str, figure: Callable[[TurnMeans], float], means: Sequence[TurnMeans]) -> Table:
    table = Table(title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for turn in dict.fromkeys(one.turn for one in means):
        table.add_column(f"turn {turn}", justify="right", no_wrap=True)
    for way, turns in by_way(means).items():
        table.add_row(way, *(f"{figure(one):.3g}" for one in turns))
    return table


def by_way(means: Sequence[TurnMeans]) -> dict[str, list[TurnMeans]]:
    """The turns of each way."""
    ways: dict[Place, list[TurnMeans]] = {}
    for one in means:
        ways.setdefault(one.place, []).append(one)
    return {place.way: turns for place, turns in ways.items()}
