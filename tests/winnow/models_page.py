"""The table of families in docs/models.md: `python -m tests.winnow.models_page` writes it anew."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.winnow.families import FAMILIES, Outcome, outcome

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_ROW = re.compile(r"^\| `([^`]+)` \|.*\|$", re.MULTILINE)
_TABLES = re.compile(r"(?<=<!-- families -->\n).*(?=<!-- end -->)", re.DOTALL)


def row(outcome: Outcome) -> str:
    kinds = "; or ".join(", ".join(one) for one in outcome.kinds)
    return f"| `{outcome.family}` | {outcome.reason or kinds} |"


def rows() -> dict[str, str]:
    """The page's row of each family."""
    return {match[1]: match[0] for match in _ROW.finditer(PAGE.read_text())}


def tables(outcomes: list[Outcome]) -> str:
    running = [row(one) for one in outcomes if one.reason is None]
    refused = [row(one) for one in outcomes if one.reason is not None]
    return "\n".join(
        (
            f"\n## {len(running)} families that run\n",
            "| Family | Layers |\n|---|---|",
            *running,
            f"\n## {len(refused)} families that are refused\n",
            "| Family | Reason |\n|---|---|",
            *refused,
            "\n",
        )
    )


def main() -> None:
    outcomes = []
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            outcomes.append(outcome(family, Path(folder)))
    PAGE.write_text(_TABLES.sub(lambda _: tables(outcomes), PAGE.read_text()))


if __name__ == "__main__":
    main()
