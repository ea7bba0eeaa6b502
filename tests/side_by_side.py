"""In which order tests run, and which of them may run at once (see `make test`).

What only computes comes first: it is quick, and two of its files keep two cores busy. Then come
the files that start whole services and mostly wait, beside those that run a service in their own
process. Last come, one after the other, those whose services are replaced under load: each keeps
two cores busy by itself.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

_ORDER = (
    "tests/test_",
    "tests/winnow/",
    "tests/evals/",
    "tests/training/",
    "tests/chaos/",
    "tests/e2e/",
    "tests/deploy/",
    "tests/examples/",
    "tests/services/",
    "tests/docs/",
)
_LAST = (
    "tests/e2e/test_cluster.py",
    "tests/deploy/test_compose.py",
    "tests/deploy/test_rolling.py",
)
# Files that share processes, which are started once; any other file is on its own.
_TOGETHER = {"tests/chaos/": "tests/chaos/"} | dict.fromkeys(_LAST, "last")


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """The quick ones first; a file's tests stay as they are."""
    return sorted(items, key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    if nodeid.startswith(_LAST):
        return len(_ORDER) + 1
    places = (idx for idx, start in enumerate(_ORDER) if nodeid.startswith(start))
    return next(places, len(_ORDER))


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker whole files, in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        together = (unit for start, unit in _TOGETHER.items() if file.startswith(start))
        return next(together, file)
