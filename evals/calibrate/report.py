"""What a calibration found, as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.calibrate.measured import Result
from evals.calibrate.request import Found

PICTURE = "calibration.png"


def print_found(found: Found, console: Console) -> None:
    """The table of held-out prompts, and what of it to believe."""
    for task, score in found.left_out.items():
        console.print(f"left out: {task}, of which the model answers {score:.0%} unpruned")
    num_prompts = found.chosen.num_prompts
    console.print(f"\n[bold]{num_prompts:,} held-out prompts[/], in %, with 95% intervals")
    console.print(_table(found.table))
    console.print(
        f"On the {found.searched.num_prompts:,} prompts of the search it keeps "
        f"{found.searched.kept}{_cross_validated(found)}.",
        highlight=False,
        soft_wrap=True,
    )


def _cross_validated(found: Found) -> str:
    if found.cross_validated is None:
        return ""
    return f", {found.cross_validated:.1%} cross-validated"


def _table(rows: Sequence[Result]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("settings")
    for header in ("score", "of unpruned", "prefill\ncomputed", "KV\nkept"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{100 * row.score:.1f}",
            f"{100 * row.kept.mean:.1f} ({100 * row.kept.low:.1f} to {100 * row.kept.high:.1f})",
            f"{100 * row.prefill:.1f}",
            f"{100 * row.kv:.1f}",
        )
    return table


def draw(found: Found, folder: Path) -> Path:
    """Writes the picture: score kept against prefill computed."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    from evals.calibrate.picture import against_prefill  # noqa: PLC0415 - needs matplotlib
    from evals.pictures import style  # noqa: PLC0415 - needs matplotlib

    with mpl.rc_context(style.LOOK):
        against_prefill(found).savefig(folder / PICTURE)
    return folder / PICTURE
