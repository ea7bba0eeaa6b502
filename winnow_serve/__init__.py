"""Starts the `winnow` command and the Ray Serve application, from a checkout or an installed wheel.

Other packages may be called `services` or `evals` too. The wheel therefore installs Winnow's own
in a private folder. The entry points here put that folder first in `sys.path`, and in PYTHONPATH
for the processes that this one starts.
"""

import os
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "_private"  # setup.py puts them there; a checkout has them in its root


def main() -> int:
    """The `winnow` command; returns its exit code."""
    _import_own_first()
    from services.cli.main import main as run_command  # noqa: PLC0415 - found only from here on

    return run_command()


def build(args: dict[str, Any]) -> object:
    """The application for `serve deploy`; `args` are settings that override the environment."""
    _import_own_first()
    from services.app import build_app  # noqa: PLC0415 - found only from here on
    from services.common.settings_sources import load_settings  # noqa: PLC0415 - found only from here on

    return build_app(load_settings(args))


def _import_own_first() -> None:
    own = str(_INSTALLED if _INSTALLED.is_dir() else _HERE.parent)
    sys.path.insert(0, own)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *(p for p in others if p not in ("", own))])
