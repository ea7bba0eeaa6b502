"""Plots of mean accuracy against budget and against prefill compute."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from evals.pictures import style
from evals.summary import Overall, Summary
from evals.variants import in_lines

_PANEL = (4.2, 3.8)
_LEGEND = 2.0  # inches
_MAX_POINT = 9.0
_MIN_POINT = 4.0


def against_budget(summary: Summary) -> Figure | None:
    """Plot accuracy over budget: a line per method, a panel per length."""
    if not any(row.budget is not None for row in summary.overall):
        return None
    lengths, looks = _lengths(summary), _looks(summary)
    figure, axes = style.panels(len(lengths), *_PANEL, beside=_LEGEND)
    for panel, length in zip(axes, lengths, strict=True):
        rows = [row for row in summary.overall if row.length == length]
        _unpruned_level(panel, rows)
        for method, (color, marker) in looks.items():
            own = _by_budget(rows, method)
            panel.errorbar(
                [row.budget or 0 for row in own],
                [100 * row.mean for row in own],
                [100 * (row.standard_error or 0) for row in own],
                color=color,
                marker=marker,
                capsize=3,
                label=in_lines(method),
            )
        _budget_axis(panel, rows)
        panel.set_title(f"{length:,} tokens")
        _score_axis(panel)
    axes[0].set_ylabel("mean score over tasks, %")
    style.add_legend(figure, axes, "method")
    return figure


def against_prefill(summary: Summary) -> Figure | None:
    """Plot accuracy over the share of layer-tokens computed: a point per method and budget."""
    if not summary.overall:
        return None
    lengths, looks = _lengths(summary), _looks(summary)
    figure, axes = style.panels(len(lengths), *_PANEL, beside=_LEGEND)
    for panel, length in zip(axes, lengths, strict=True):
        rows = [row for row in summary.overall if row.length == length]
        for row in _without_budget(rows):
            panel.plot(
                100 * row.computed_share,
                100 * row.mean,
                color=style.UNPRUNED_COLOR,
                marker="*",
                markersize=13,
                linestyle="",
                label=row.method,
            )
        for method, (color, marker) in looks.items():
            _prefill_line(panel, _by_budget(rows, method), method, color, marker)
        panel.set_title(f"{length:,} tokens")
        panel.set_xlabel("share of layer-tokens computed in prefill, %")
        panel.set_xlim(0, max(105.0, *(105 * row.computed_share for row in rows)))
        _score_axis(panel)
    axes[0].set_ylabel("mean score over tasks, %")
    style.add_legend(figure, axes, "method\n(larger: larger budget)")
    return figure


def _prefill_line(
    panel: Axes, rows: Sequence[Overall], method: str, color: str, marker: str
) -> None:
    shares = [100 * row.computed_share for row in rows]
    scores = [100 * row.mean for row in rows]
    panel.plot(shares, scores, color=color, linewidth=1, alpha=0.6)
    for idx, (share, score) in enumerate(zip(shares, scores, strict=True)):
        size = _MAX_POINT - (_MAX_POINT - _MIN_POINT) * (len(rows) - 1 - idx) / max(len(rows), 2)
        panel.plot(
            share,
            score,
            color=color,
            marker=marker,
            markersize=size,
            linestyle="",
            label=in_lines(method),
        )


def _lengths(summary: Summary) -> list[int]:
    return sorted({row.length for row in summary.overall})


def _looks(summary: Summary) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method that has budgets."""
    return style.looks(
        dict.fromkeys(row.method for row in summary.overall if row.budget is not None)
    )


def _by_budget(rows: Sequence[Overall], method: str) -> list[Overall]:
    own = [row for row in rows if row.method == method and row.budget is not None]
    return sorted(own, key=lambda row: row.budget or 0)


def _without_budget(rows: Sequence[Overall]) -> list[Overall]:
    return [row for row in rows if row.budget is None]


def _unpruned_level(panel: Axes, rows: Sequence[Overall]) -> None:
    for row in _without_budget(rows):
        panel.axhline(
            100 * row.mean,
            color=style.UNPRUNED_COLOR,
            linestyle="--",
            linewidth=1.2,
            label=row.method,
        )


def _budget_axis(panel: Axes, rows: Sequence[Overall]) -> None:
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(budgets))
    panel.xaxis.set_major_formatter(FixedFormatter([f"{budget:,}" for budget in budgets]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("budget, tokens and KV entries per head")


def _score_axis(panel: Axes) -> None:
    panel.set_ylim(-3, 103)
    panel.set_yticks(range(0, 101, 20))
