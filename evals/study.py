"""`python -m evals.study RUN...`: what runs of `winnow eval` or `calibrate` say of every variant.

Prints each variant beside the unpruned answers of the same prompts, and draws the share kept by
selection layer and rho by layer. Not part of the command: it makes docs/study.md's figures.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.calibrate.candidates import UNPRUNED_VARIANT
from evals.calibrate.measured import Measured, Result
from evals.pictures import style
from evals.records import SETTINGS_FILE, Record, RunFolder
from evals.variants import MethodSpec, Variant, in_lines, parse_methods

_PANEL = (5.0, 3.6)
_LEGEND = 2.4  # inches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    for folder in args.runs:
        records = _read(folder)
        results = list(_results(records))
        Console(width=150).print(_table(folder.name, results))
        with rc_context(style.LOOK):
            for name, figure in _figures(records, results):
                figure.savefig(args.output / f"study_{folder.name}_{name}.png")


def _read(folder: Path) -> list[Record]:
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    with RunFolder(folder, settings) as run:
        return run.records


def _results(records: Sequence[Record]) -> Iterator[tuple[MethodSpec, Result, Result]]:
    """Each variant and the unpruned model, over the prompts that both answered."""
    measured = Measured(records)
    for method in dict.fromkeys(record.method for record in records):
        (spec,) = parse_methods(method)
        prompts = [(r.task, r.index) for r in records if r.method == method]
        answered = {(r.task, r.index) for r in records if r.method == UNPRUNED_VARIANT.method}
        paired = [prompt for prompt in prompts if prompt in answered]
        if paired:
            found = measured.result(Variant(spec, None), paired)
            yield spec, found, measured.result(UNPRUNED_VARIANT, paired)


def _table(title: str, results: Sequence[tuple[MethodSpec, Result, Result]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    for header in ("variant", "prompts", "score", "unpruned", "kept (95%)", "prefill", "KV"):
        table.add_column(header, no_wrap=header != "variant")
    for spec, found, full in results:
        shares = (f"{100 * share:.1f}" for share in (found.score, full.score))
        costs = (f"{found.prefill:.0%}", f"{found.kv:.0%}")
        table.add_row(spec.text, str(found.num_prompts), *shares, str(found.kept), *costs)
    return table


def _figures(
    records: Sequence[Record], results: Sequence[tuple[MethodSpec, Result, Result]]
) -> Iterator[tuple[str, Figure]]:
    if any(spec.method == "fastkv" for spec, _, _ in results):
        yield "layers", _by_layer(results)
    watched = [r for r in records if r.rho and r.selection_layer is None]
    if watched:
        yield "rho", _rho(watched)


def _by_layer(results: Sequence[tuple[MethodSpec, Result, Result]]) -> Figure:
    """The share of the unpruned score that fixed layers keep, and snapkv without a selection."""
    figure, (panel,) = style.panels(1, *_PANEL, beside=_LEGEND)
    curves: dict[str, list[tuple[int, Result]]] = {}
    for spec, found, _ in results:
        if spec.method == "fastkv" and "fixed_layer" in spec.options:
            curve = f"select_tokens={spec.options.get('select_tokens', 'kv_budget')}"
            curves.setdefault(curve, []).append((spec.options["fixed_layer"], found))
    for name, (color, marker) in style.looks(curves).items():
        points = sorted(curves[name], key=lambda point: point[0])
        kept = [found.kept for _, found in points]
        panel.errorbar(
            [layer for layer, _ in points],
            [100 * one.mean for one in kept],
            [[100 * (k.mean - k.low) for k in kept], [100 * (k.high - k.mean) for k in kept]],
            color=color,
            marker=marker,
            capsize=3,
            label=name,
        )
    panel.axhline(100, color=style.UNPRUNED_COLOR, linestyle="--", linewidth=1.2, label="full")
    panel.set_xlabel("selection layer")
    panel.set_ylabel("of the unpruned score, %")
    panel.set_ylim(bottom=0)
    style.add_legend(figure, [panel], "fixed layer")
    return figure


def _rho(watched: Sequence[Record]) -> Figure:
    """Rho of runs that never select, a line per prompt, coloured by task."""
    figure, (panel,) = style.panels(1, *_PANEL, beside=_LEGEND)
    observer = watched[0].method
    looks = style.looks(dict.fromkeys(record.task for record in watched))
    for record in watched:
        if record.method == observer:
            layers, rho = zip(*record.rho, strict=True)
            panel.plot(layers, rho, color=looks[record.task][0], linewidth=1, label=record.task)
    panel.axhline(0.3, color=style.MUTED, linestyle="--", linewidth=1, label="threshold 0.3")
    panel.set_xlabel("layer")
    panel.set_ylabel("relative rank variance, rho")
    panel.set_title(in_lines(observer), fontsize=7)
    style.add_legend(figure, [panel], "task")
    return figure


if __name__ == "__main__":
    main()
