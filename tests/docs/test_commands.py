"""Every command that a page shows exists, with every flag."""

import re
import shlex
from pathlib import Path

import pytest

from services.cli.parser import make_parser
from tests.docs.pages import PAGES, ROOT, code_blocks

INLINE = re.compile(r"`((?:winnow|make|python -m) [^`]*)`")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every console block, and of what stands in backticks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        name = page.relative_to(ROOT).as_posix()
        for block in code_blocks(text, "console"):
            lines = re.findall(r"^\$ (.+)$", block.replace("\\\n", " "), re.M)
            found += [(name, line) for line in lines]
        found += [(name, command.replace("\n", " ")) for command in INLINE.findall(text)]
    return found


def words(command: str) -> list[str]:
    """Up to a redirection, a pipe or a second command; without variables before it."""
    parts = shlex.split(command, comments=True)
    ends = [idx for idx, part in enumerate(parts) if part in (">", ">>", "|", "&&")]
    parts = parts[: min(ends, default=len(parts))]
    while parts and re.fullmatch(r"[A-Z_]+=.*", parts[0]):
        del parts[0]
    return parts


def shown(program: str) -> list[tuple[str, tuple[str, ...]]]:
    """(page, arguments) of each time that a program is shown; what has no arguments is its name."""
    found = dict.fromkeys(
        (page, tuple(parts[1:]))
        for page, command in commands()
        if len(parts := words(command)) > 1 and parts[0] == program
    )
    return list(found)


def no_placeholder(arguments: tuple[str, ...]) -> bool:
    return not any("..." in part or "…" in part or part.startswith("[") for part in arguments)


@pytest.mark.parametrize(("page", "arguments"), shown("winnow"))
def test_winnow_takes_what_a_page_shows(
    page: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A command alone in a sentence, like `winnow eval`, is looked for by its name."""
    alone = len(arguments) == 1 or not no_placeholder(arguments)
    try:
        make_parser().parse_args([arguments[0], "--help"] if alone else arguments)
    except SystemExit as end:
        assert end.code == 0, f"{page}: winnow {shlex.join(arguments)}: {capsys.readouterr().err}"


@pytest.mark.parametrize(("page", "arguments"), shown("make"))
def test_make_has_what_a_page_shows(page: str, arguments: tuple[str, ...]) -> None:
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    assert arguments[0] in " ".join(targets).split(), f"{page}: make {arguments[0]}"


def modules_of_ours() -> list[tuple[str, tuple[str, ...]]]:
    found = [(page, arguments[1:]) for page, arguments in shown("python") if arguments[0] == "-m"]
    return [(page, rest) for page, rest in found if Path(ROOT, rest[0].split(".")[0]).is_dir()]


@pytest.mark.parametrize(("page", "arguments"), modules_of_ours())
def test_python_runs_the_modules_that_a_page_shows(page: str, arguments: tuple[str, ...]) -> None:
    """And a file of the module's folder has its flags."""
    module, *rest = arguments
    file = ROOT / module.replace(".", "/")
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    assert file.exists(), f"{page}: {module}"
    sources = "".join(path.read_text() for path in file.parent.glob("*.py"))
    flags = [part.partition("=")[0] for part in rest if part.startswith("--")]
    assert [flag for flag in flags if f'"{flag}"' not in sources] == [], f"{page}: {module}"
