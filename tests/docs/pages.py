"""The repository's pages, as text."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "k8s" / "winnow" / "README.md",
    ROOT / "models" / "winnow-tiny" / "README.md",
)


def section(page: str, heading: str) -> str:
    """What stands under a heading of docs/`page`, its subsections included."""
    text = (ROOT / "docs" / page).read_text()
    level = heading.partition(" ")[0]
    _, _, rest = text.partition(f"\n{heading}\n")
    assert rest, f"{page} has no {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.M)[0]


def code_blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def first_column(text: str) -> list[str]:
    """The names in backticks that a table's rows begin with."""
    return re.findall(r"^\| `(\w[\w-]*)` \|", text, re.M)
