"""Starts Winnow's service and commands, from a checkout or where the package is installed.

`services` and `evals` are names that other packages may have too. An installed Winnow therefore
keeps them in a folder of its own, which is put first among the places to import from: here, and in
every process that is started from here.
"""

import os
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "_private"  # made by setup.py; in a checkout they lie in the repository's root


def main() -> int:
    """The `winnow` command; returns its exit code."""
    _import_own_first()
    from services.cli.main import main as run_command  # noqa: PLC0415 - found only from here on

    return run_command()


def build(args: dict[str, Any]) -> object:
    """The application for `serve deploy`; `args` are settings, over the nodes' environment."""
    _import_own_first()
    from services.app import build_app  # noqa: PLC0415 - found only from here on
    from services.common.settings import load_settings  # noqa: PLC0415 - found only from here on

    return build_app(load_settings(args))


def _import_own_first() -> None:
    own = str(_INSTALLED if _INSTALLED.is_dir() else _HERE.parent)
    sys.path.insert(0, own)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *(p for p in others if p not in ("", own))])
