"""The common style of all plots: light, colour-blind-safe, with the legend next to the axes."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow, which is hard to see on white; black is for `full`.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A93", "#8C564B")
UNPRUNED_COLOR = "#222222"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MUTED = "#666666"

# Applied while a picture is drawn (matplotlib.rc_context).
LOOK: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.facecolor": "white",
}


def panels(
    count: int, width: float, height: float, *, beside: float = 0
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, and room `beside` them for a legend; sizes in inches."""
    figure = Figure(figsize=(width * count + beside, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharey=True)
    return figure, list(axes[0])


def add_legend(figure: Figure, axes: Sequence[Axes], title: str) -> None:
    """Add one legend for all panels, to their right."""
    shown: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside right upper",
        title=title,
        alignment="left",
        frameon=False,
        fontsize=9,
    )


def in_order(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name; colours go from dark to light in the names' order."""
    light = 0.86  # the map's last colours are hard to see on white
    steps = [light * idx / max(1, len(names) - 1) for idx in range(len(names))]
    colors = [to_hex(colormaps["viridis"](step)) for step in steps]
    return dict(zip(names, zip(colors, cycle(MARKERS), strict=False), strict=True))


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name."""
    return dict(zip(names, cycle(zip(COLORS, MARKERS, strict=True)), strict=False))


def file_part(text: str) -> str:
    """`text`, such as `asl:threshold=0.4`, as part of a file name."""
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in text)
