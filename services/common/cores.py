"""Prefill and decode on the same cores: who gives way can see that a prompt is computed.

Nobody waits for a lock. A prefill worker holds a named pipe open for writing while it computes;
decode workers, which hold its other end, can ask whether anybody writes. What a killed process
held, the kernel closes.
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

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of the user's own lies in it


class SharedCores:
    """The cores that this process may run on, with whatever workers of its user run there too."""

    def __init__(self, folder: Path) -> None:
        """folder: this user's, made if need be.  Raises OSError if it cannot be used."""
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_own(folder, stat.S_ISDIR)
        cores = sum(1 << core for core in os.sched_getaffinity(0))
        pipe = folder / f"prefill-{cores:x}"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(pipe, 0o600)
        _require_own(pipe, stat.S_ISFIFO)
        self._reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._reader, 0)  # that nobody writes is reported without being asked
        os.close(self._open_writer())  # but only once somebody has written

    def _open_writer(self) -> int:
        """Of the same pipe, whatever has become of its name."""
        return os.open(f"/proc/self/fd/{self._reader}", os.O_WRONLY | os.O_NONBLOCK)

    @contextlib.contextmanager
    def prefilling(self) -> Iterator[None]:
        """Lets decode workers see that a prompt is computed on these cores."""
        writer = self._open_writer()
        try:
            yield
        finally:
            os.close(writer)

    @property
    def prefill_runs(self) -> bool:
        """Whether any prefill worker computes a prompt on these cores."""
        return not self._poll.poll(0)

    def close(self) -> None:
        os.close(self._reader)


def open_shared_cores(settings: Settings) -> SharedCores | None:
    """None for workers on a GPU, and where prefill and decode are to compete."""
    if settings.device != "cpu" or settings.decode_share == 1:
        return None
    folder = settings.cores_dir or _SHARED_MEMORY / f"winnow-{os.getuid()}"
    try:
        return SharedCores(folder)
    except OSError as error:
        logger.warning("prefill and decode will compete for the cores: %s", error)
        return None


def _require_own(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise PermissionError for what somebody else has put there."""
    found = path.lstat()
    if found.st_uid != os.getuid() or not is_kind(found.st_mode):
        raise PermissionError(f"{path} is not this user's, or not of its kind")
