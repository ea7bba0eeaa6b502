"""Looking at processes, and waiting for them to end.

psutil's own wait_procs can raise FileNotFoundError for one that ends at that very moment.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

_T = TypeVar("_T")


def of_each(processes: Iterable[psutil.Process], look: Callable[[psutil.Process], _T]) -> list[_T]:
    """What `look` finds, without those that have ended meanwhile."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            found.append(look(process))
    return found


def left_alive(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended within the time."""
    deadline_s = time.monotonic() + timeout_s
    alive = [process for process in processes if _is_alive(process)]
    while alive and time.monotonic() < deadline_s:
        time.sleep(0.05)
        alive = [process for process in alive if _is_alive(process)]
    return alive


def title(process: psutil.Process) -> str:
    """Its command line, which Ray sets to what a worker does; empty if it cannot be read."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
