"""What a run of `winnow eval` leaves in its folder."""

import json
from pathlib import Path
from typing import Any

from evals.records import Record, RunFolder


def records_in(folder: Path) -> list[Record]:
    settings = json.loads((folder / "settings.json").read_text())
    with RunFolder(folder, settings) as opened:
        return opened.records


def outcomes(records: list[Record]) -> dict[Any, Any]:
    """What a run found, apart from the time that it took."""
    return {r.key: (r.answer, r.score, r.rho, r.selection_layer, r.references) for r in records}
