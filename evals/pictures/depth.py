"""Heat maps of needle-in-a-haystack accuracy over needle depth and prompt length."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from evals.pictures import style
from evals.records import Record
from evals.variants import in_lines


def heat_maps(records: Sequence[Record]) -> dict[str, Figure]:
    """A heat map per task with depths, method and budget, by file name (without suffix)."""
    groups: dict[tuple[str, str, int | None], list[Record]] = {}
    for record in records:
        if record.depth is not None:
            key = (record.task, record.method, record.budget)
            groups.setdefault(key, []).append(record)
    return {_name(*key): _heat_map(*key, group) for key, group in groups.items()}


def _name(task: str, method: str, budget: int | None) -> str:
    parts = [task, style.file_part(method)] + ([] if budget is None else [str(budget)])
    return "_".join(parts)


def _heat_map(task: str, method: str, budget: int | None, records: Sequence[Record]) -> Figure:
    lengths = sorted({record.length for record in records})
    depths = sorted({record.depth for record in records if record.depth is not None})
    scores = _mean_scores(records, lengths, depths)
    figure, (panel,) = style.panels(1, 3.4 + 0.75 * len(lengths), 1.5 + 0.36 * len(depths))
    image = panel.imshow(scores, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    panel.grid(visible=False)
    panel.set_xlabel("prompt tokens")
    panel.set_ylabel("depth of the needle")
    panel.set_title(
        f"{task}: {in_lines(method)}" + ("" if budget is None else f", budget {budget:,}")
    )
    for (row, column), score in np.ndenumerate(scores):
        if not np.isnan(score):
            color = "white" if score < 50 else "black"
            panel.text(column, row, f"{score:.0f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=panel, label="score, %")
    return figure


def _mean_scores(
    records: Sequence[Record], lengths: Sequence[int], depths: Sequence[float]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[depth, length] in %; NaN where there is no sample."""
    scores = np.full((len(depths), len(lengths)), np.nan)
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            own = [r.score for r in records if (r.depth, r.length) == (depth, length)]
            if own:
                scores[row, column] = 100 * np.mean(own)
    return scores
