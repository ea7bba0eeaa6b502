"""What has come of a download: a bar on a terminal, lines of the log elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from tqdm import tqdm

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], object]  # bytes that are there, and bytes in all

_LINE_EVERY_S = 10.0


class Cancelled(Exception):
    """Raised in the threads of a download that is to end."""


class Progress:
    """Threads `add` what they receive; the thread that waits for them calls `show` now and then.

    total_bytes: of the files that were not there; `present_bytes` of them came in earlier tries.
    last_change_s: when bytes came, by the monotonic clock.
    """

    def __init__(
        self,
        name: str,
        total_bytes: int,
        present_bytes: int = 0,
        on_progress: OnProgress | None = None,
        *,
        has_bar: bool = False,
    ) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = present_bytes
        self.last_change_s = time.monotonic()
        self._name = name
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._cancelled = False
        self._next_line_s = self.last_change_s + _LINE_EVERY_S
        self._bar = _bar(name, total_bytes, present_bytes) if has_bar else None

    def add(self, num_bytes: int) -> None:
        """Raises Cancelled after `cancel`."""
        if self._cancelled:
            raise Cancelled
        with self._lock:
            self.done_bytes += num_bytes
            self.last_change_s = time.monotonic()

    def cancel(self) -> None:
        self._cancelled = True

    def show(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.done_bytes, self.total_bytes)
        if self._bar is not None:
            self._bar.update(self.done_bytes - self._bar.n)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s += _LINE_EVERY_S
            logger.info("%s: %s", self._name, self)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.update(self.done_bytes - self._bar.n)
            self._bar.close()

    def __str__(self) -> str:
        share = self.done_bytes / self.total_bytes if self.total_bytes else 1.0
        return f"{in_units(self.done_bytes)} of {in_units(self.total_bytes)} ({share:.0%})"


class FileBar:
    """Stands where huggingface_hub's downloads expect a class of tqdm's, and is its instances too.

    Bytes count when they are written (`update`), not when they come over Xet's network.
    """

    def __init__(self, progress: Progress) -> None:
        self.total = 0
        self._progress = progress

    def __call__(self, *_: object, **__: object) -> "FileBar":
        return self

    def __enter__(self) -> "FileBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, num_bytes: float | None = 1) -> None:
        self._progress.add(int(num_bytes or 0))

    def _ignore(self, *_: object, **__: object) -> None: ...

    close = refresh = update_transfer = set_postfix_str = set_transfer_postfix_str = _ignore


def _bar(name: str, total_bytes: int, present_bytes: int) -> "tqdm[Any] | None":
    if are_progress_bars_disabled() or not sys.stderr.isatty():
        return None
    return tqdm(
        desc=name,
        total=total_bytes,
        initial=present_bytes,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        leave=False,
    )


def in_units(num_bytes: float) -> str:
    """Like 15.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
