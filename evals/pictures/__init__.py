"""Plots of a run's results, as PNG files next to its records."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from evals.records import Record
from evals.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_draw() -> bool:
    """Whether matplotlib is installed; it is in the extra `eval`."""
    return find_spec("matplotlib") is not None


def draw_pictures(
    folder: Path, records: Sequence[Record], summary: Summary, thresholds: Mapping[str, float]
) -> list[Path]:
    """Write each picture for which there is data; returns the paths. Without matplotlib: none.

    thresholds: ASL's, by method as requested, where known.
    """
    if not can_draw():
        return []
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    from evals.pictures import style  # noqa: PLC0415 - needs matplotlib

    with mpl.rc_context(style.LOOK):
        written = []
        for name, figure in _figures(records, summary, thresholds):
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
    return written


def _figures(
    records: Sequence[Record], summary: Summary, thresholds: Mapping[str, float]
) -> "Iterator[tuple[str, Figure]]":
    from evals.pictures import accuracy, depth, layers  # noqa: PLC0415 - needs matplotlib

    figures = {
        "accuracy_vs_budget": accuracy.against_budget(summary),
        "accuracy_vs_prefill": accuracy.against_prefill(summary),
        "selection_layer": layers.selection_layers(records),
        "rho": layers.rho_by_layer(records, thresholds),
    }
    yield from ((name, figure) for name, figure in figures.items() if figure is not None)
    yield from depth.heat_maps(records).items()
