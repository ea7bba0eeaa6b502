"""Score kept against prefill computed: fixed layers as points, the table's rows as marks."""

from matplotlib.figure import Figure

from evals.calibrate.request import Found
from evals.pictures import style

_PANEL = (5.2, 4.0)
_LEGEND = 2.2  # inches


def against_prefill(found: Found) -> Figure:
    figure, (panel,) = style.panels(1, *_PANEL, beside=_LEGEND)
    panel.plot(
        [100 * one.prefill for one in found.curve],
        [100 * one.kept.mean for one in found.curve],
        color=style.MUTED,
        marker=".",
        linestyle="",
        alpha=0.6,
        label="fixed layers (search)",
    )
    for name, (color, marker) in style.looks(row.name for row in found.table).items():
        row = next(row for row in found.table if row.name == name)
        kept = row.kept
        below, above = 100 * (kept.mean - kept.low), 100 * (kept.high - kept.mean)
        panel.errorbar(
            [100 * row.prefill],
            [100 * kept.mean],
            [[max(0.0, below)], [max(0.0, above)]],
            color=color,
            marker=marker,
            linestyle="",
            capsize=3,
            label=name,
        )
    panel.axhline(100, color=style.UNPRUNED_COLOR, linestyle="--", linewidth=1)
    panel.set_xlabel("layer-tokens computed in prefill, %")
    panel.set_ylabel("of the unpruned score, %")
    panel.set_xlim(0, 105)
    panel.set_ylim(bottom=0)
    style.add_legend(figure, [panel], "held-out prompts")
    return figure
