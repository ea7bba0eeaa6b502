"""Shared output of the benchmarks: a table on the terminal, and JSON."""

import json
import platform
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def arguments(description: str) -> ArgumentParser:
    """Argument parser with the options that all benchmarks share: --json FILE, --quick."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    return parser


def show(title: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Print rows with equal keys as a table; floats have three significant digits."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for note in notes:
        console.print(note)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cpu_kind() -> str:
    """The CPU's name, and which bfloat16 products it has."""
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    flags = {"avx512_bf16", "amx_bf16"} & set(names.get("flags", "").split())
    return f"{names.get('model name', platform.machine())}, {', '.join(sorted(flags)) or 'no bf16'}"


def write_json(path: Path | None, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows and the machine they were measured on to `path`, if there is one."""
    if path is None:
        return
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    machine |= {"python": platform.python_version(), "machine": platform.machine()}
    machine |= {"cpu": cpu_kind()}
    path.write_text(
        json.dumps({"benchmark": name, "machine": machine, "rows": list(rows)}, indent=1)
    )
