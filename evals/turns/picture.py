"""Plots of score, prefill compute and time to first token by turn."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.pictures import style
from evals.turns.summary import TurnMeans
from evals.turns.table import FIGURES, by_way

_PANEL = (3.6, 3.4)
_LEGEND = 2.6  # inches


def by_turn(means: Sequence[TurnMeans]) -> Figure:
    """A panel per figure, a line per way; of one length."""
    figure = Figure(figsize=(_PANEL[0] * len(FIGURES) + _LEGEND, _PANEL[1]), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(FIGURES), squeeze=False)[0])
    ways = by_way(means)
    for panel, (title, value) in zip(axes, FIGURES.items(), strict=True):
        for (way, turns), (color, marker) in zip(
            ways.items(), style.looks(ways).values(), strict=True
        ):
            panel.plot(
                [one.turn for one in turns],
                [value(one) for one in turns],
                color=color,
                marker=marker,
                label=way,
            )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("turn")
        panel.set_xticks(sorted({one.turn for one in means}))
        panel.set_ylim(bottom=0)
    style.add_legend(figure, axes, f"{means[0].place.length:,} tokens")
    return figure
