"""Prefill by turns: what prompts save each other, and cost each other.

Cases: `questions` (about one document: benchmarks/prefix_questions.py), `mixed_documents` (to two
workers, with and without affinity) and `trace` (only with --trace; both benchmarks/
prefix_traffic.py), `short_behind_long` (benchmarks/prefix_scheduling.py), `memory` of the store
(benchmarks/prefix_memory.py).
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.prefix_memory import memory
from benchmarks.prefix_questions import questions
from benchmarks.prefix_scheduling import short_behind_long
from benchmarks.prefix_traffic import mixed_documents, trace
from benchmarks.report import arguments, show, write_json

Rows = list[dict[str, Any]]

CASES: dict[str, Callable[[Path, Namespace], Rows]] = {
    "questions": lambda folder, options: questions(folder, options.quick, options.peer),
    "mixed_documents": lambda _, options: mixed_documents(options.quick),
    "short_behind_long": lambda folder, options: short_behind_long(folder, options.quick),
    "memory": lambda folder, options: memory(folder, options.quick),
    "trace": lambda _, options: trace(options.trace, options.quick, options.tokens_per_block),
}


def main() -> None:
    parser = arguments("what prompts save each other in prefill, and cost each other")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="(default: all)")
    parser.add_argument("--peer", metavar="URL", help="of another service with prefix caching")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON Lines, as Mooncake's")
    parser.add_argument(
        "--tokens-per-block", type=int, default=32, help="for 512 of the trace's (default: 32)"
    )
    options = parser.parse_args()
    cases = options.cases or [name for name in CASES if name != "trace" or options.trace]
    if "trace" in cases and options.trace is None:
        parser.error("case trace needs --trace FILE")
    found: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cases:
            rows = CASES[name](Path(folder), options)
            show(name.replace("_", " "), rows)
            found += [{"case": name} | row for row in rows]
    print(__doc__)
    write_json(options.json, "prefix", found)


if __name__ == "__main__":
    main()
