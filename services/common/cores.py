"""Cores shared by prefill and decode: decode sees when prefill is computing, and yields to it.

There is no lock. A prefill worker holds a named pipe (FIFO) open for writing while it computes;
decode workers hold its read end and poll whether there is a writer. The kernel closes the pipe of
a killed process.
"""

import contextlib
import logging
import os
import select
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from services.common.settings import Settings

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only the parent of a folder private to the user


class SharedCores:
    """The cores this process may run on, shared with other workers of the same user."""

    def __init__(self, folder: Path) -> None:
        """folder: private to the user, created if missing.  Raises OSError if it cannot be used."""
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_own(folder, stat.S_ISDIR)
        cores = sum(1 << core for core in os.sched_getaffinity(0))
        pipe = folder / f"prefill-{cores:x}"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(pipe, 0o600)
        _require_own(pipe, stat.S_ISFIFO)
        self._reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._reader, 0)  # POLLHUP, for no writer, needs no request
        os.close(self._open_writer())  # but it is reported only after a first writer

    def _open_writer(self) -> int:
        """Open the same pipe for writing, even if its path has been removed or replaced."""
        return os.open(f"/proc/self/fd/{self._reader}", os.O_WRONLY | os.O_NONBLOCK)

    @contextlib.contextmanager
    def prefilling(self) -> Iterator[None]:
        """Show decode workers that a prompt is being computed on these cores."""
        writer = self._open_writer()
        try:
            yield
        finally:
            os.close(writer)

    @property
    def prefill_runs(self) -> bool:
        """Whether any prefill worker is computing a prompt on these cores."""
        return not self._poll.poll(0)

    def close(self) -> None:
        os.close(self._reader)


def open_shared_cores(settings: Settings) -> SharedCores | None:
    """None for workers on a GPU, with `decode_share` 1, or if the folder cannot be used."""
    if settings.device != "cpu" or settings.decode_share == 1:
        return None
    folder = settings.cores_dir or _SHARED_MEMORY / f"winnow-{os.getuid()}"
    try:
        return SharedCores(folder)
    except OSError as error:
        logger.warning("prefill and decode will compete for the cores: %s", error)
        return None


def _require_own(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise PermissionError if `path` is another user's, or not of the expected kind."""
    found = path.lstat()
    if found.st_uid != os.getuid() or not is_kind(found.st_mode):
        raise PermissionError(f"{path} is not this user's, or not of its kind")
