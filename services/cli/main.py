"""The `winnow` command-line interface."""

import os
import sys
from collections.abc import Sequence

from services.cli.signals import Interrupts
from services.common.openmp import SHORT_WAITS
from winnow.errors import WinnowError

EXIT_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 if it was refused.

    Ctrl-C is handled from here on, so slow imports happen inside.
    """
    for name, value in SHORT_WAITS.items():
        os.environ.setdefault(name, value)
    interrupts = Interrupts()
    try:
        with interrupts:
            from services.cli.parser import make_parser  # noqa: PLC0415 - loads pydantic

            args = make_parser().parse_args(arguments)
            interrupts.farewell = args.farewell.format(args)
            args.run(args)
    except KeyboardInterrupt:
        interrupts.end_process()
    except WinnowError as error:
        print(f"winnow: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0
