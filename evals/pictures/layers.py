"""Plots of ASL's selection layers and of the rank variance it observed."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.pictures import style
from evals.records import Record
from evals.variants import in_lines

_NEVER = "never"


def selection_layers(records: Sequence[Record]) -> Figure | None:
    """Plot the share of samples selected at each layer: a row per task, a panel per method.

    Only methods that choose the layer per prompt are shown.
    """
    by_method = _adaptive(records)
    if not by_method:
        return None
    tasks = _tasks_by_depth(records)
    layers = _layers(by_method)
    size = (max(4.8, 2.4 + 0.42 * (len(layers) + 1)), 1.4 + 0.28 * len(tasks))
    figure, axes = style.panels(len(by_method), *size)
    for panel, (method, own) in zip(axes, by_method.items(), strict=True):
        _layer_shares(panel, own, tasks, layers)
        panel.set_title(f"{in_lines(method)}\n{_setting(own)}", fontsize=10)
    return figure


def rho_by_layer(records: Sequence[Record], thresholds: Mapping[str, float]) -> Figure | None:
    """Plot mean relative rank variance by layer: a line per task, a panel per method.

    Tasks that select later have lighter lines.
    A layer's mean is over the samples that had not selected before it; the line ends where these
    are less than a quarter.
    """
    by_method = _adaptive(records)
    if not by_method:
        return None
    tasks = _tasks_by_depth(records)
    height = max(4.4, 0.9 + 0.21 * len(tasks))
    figure, axes = style.panels(len(by_method), 4.8, height, beside=2.4)
    for panel, (method, own) in zip(axes, by_method.items(), strict=True):
        for task, (color, marker) in style.in_order(tasks).items():
            means = _mean_rho([record for record in own if record.task == task])
            panel.plot(
                list(means),
                list(means.values()),
                color=color,
                marker=marker,
                markersize=4.5,
                linewidth=1.4,
                label=task,
            )
        if method in thresholds:
            panel.axhline(
                thresholds[method],
                color=style.UNPRUNED_COLOR,
                linestyle=(0, (6, 3)),
                linewidth=1.4,
                label=f"threshold {thresholds[method]:g}",
            )
        panel.set_title(f"{in_lines(method)}\n{_setting(own)}", fontsize=10)
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(bottom=0)
    axes[0].set_ylabel("relative rank variance ρ, mean of undecided samples")
    style.add_legend(figure, axes, "task, by mean selection layer")
    return figure


def _adaptive(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records with ρ, by method; short prompts have none and are left out."""
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.rho:
            by_method[record.method].append(record)
    return dict(by_method)


def _tasks_by_depth(records: Sequence[Record]) -> list[str]:
    """Tasks in ascending order of mean selection layer."""
    layers: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.rho:
            layers[record.task].append(_place(record))
    return sorted(layers, key=lambda task: statistics.fmean(layers[task]))


def _place(record: Record) -> float:
    """The selection layer; without one, the layer after the last one evaluated."""
    if record.selection_layer is not None:
        return record.selection_layer
    return record.rho[-1][0] + 1


def _layers(by_method: Mapping[str, Sequence[Record]]) -> range:
    looked_at = [layer for own in by_method.values() for r in own for layer, _ in r.rho]
    return range(min(looked_at), max(looked_at) + 1)


def _layer_shares(
    panel: Axes, records: Sequence[Record], tasks: Sequence[str], layers: range
) -> None:
    """Draw a row per task: a dot per layer, its area the share of samples; a bar at the mean."""
    panel.set_yticks(range(len(tasks)), tasks)
    panel.set_ylim(len(tasks) - 0.4, -0.6)
    ends = [*map(str, layers), _NEVER]
    panel.set_xticks(range(layers.start, layers.stop + 1), ends)
    panel.set_xlim(layers.start - 0.7, layers.stop + 0.7)
    panel.set_xlabel("selection layer\n(area: share of samples, bar: mean)")
    for row, task in enumerate(tasks):
        own = [record for record in records if record.task == task]
        if not own:
            continue
        places = [
            layers.stop if record.selection_layer is None else record.selection_layer
            for record in own
        ]
        values, counts = np.unique(places, return_counts=True)
        panel.scatter(
            values,
            [row] * len(values),
            s=260 * counts / len(places),
            color=[style.MUTED if value == layers.stop else style.COLORS[0] for value in values],
            alpha=0.75,
            linewidths=0,
            zorder=2,
        )
        selected = [place for place in places if place != layers.stop]
        if selected:
            panel.plot(
                [statistics.fmean(selected)] * 2,
                [row - 0.36, row + 0.36],
                color=style.COLORS[1],
                linewidth=2.2,
                zorder=3,
            )


def _mean_rho(records: Sequence[Record]) -> dict[int, float]:
    """Mean ρ of each layer that at least a quarter of the samples reached."""
    by_layer: dict[int, list[float]] = defaultdict(list)
    for record in records:
        for layer_idx, rho in record.rho:
            by_layer[layer_idx].append(rho)
    return {
        layer_idx: statistics.fmean(values)
        for layer_idx, values in sorted(by_layer.items())
        if len(values) >= len(records) / 4
    }


def _setting(records: Sequence[Record]) -> str:
    """Lengths and budgets of the records, as in `1,024, 2,048 tokens; budget 128, 256`."""
    lengths = ", ".join(f"{length:,}" for length in sorted({r.length for r in records}))
    budgets = ", ".join(f"{b:,}" for b in sorted({r.budget for r in records if r.budget}))
    return f"{lengths} tokens; budget {budgets}"
