"""`python -m tests.soak`: exits with 1 if a request was lost or wrong, or memory grew."""

import argparse
import asyncio
import sys
from pathlib import Path

from tests.chaos.victim import running_victim
from tests.deploy.stack import compose_services
from tests.soak.run import Plan, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--max-requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--logs", type=Path, default=Path("build/soak"), help="folder (default: %(default)s)"
    )
    flags = parser.parse_args()
    plan = Plan(flags.minutes, flags.max_requests, flags.clients, flags.seed)
    flags.logs.mkdir(parents=True, exist_ok=True)
    with running_victim(compose_services(), flags.logs.resolve()) as victim:
        report = asyncio.run(soak(victim, plan))
    sys.stdout.writelines(f"{line}\n" for line in report.lines())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
